"""What can run a quantized linear here, and which one does.

`DITE_BACKEND=name` or `select(spec, device, name)` forces one, and fails if it can't do the job. Otherwise:

    CPU    cpu: integers in C, compiled at first use; where that can't be, expanded: weights are unpacked once, to the model's dtype
    CUDA   dequantize: weights are unpacked at each call; memory stays small
"""

import os
from typing import Any

import torch

from dite_kernels import dense, int_mm, reference
from dite_kernels.backend import Backend, InputTransform
from dite_kernels.cpu.backend import FEW_TOKENS, Cpu
from dite_kernels.quant_tensor import LinearSpec
from dite_kernels.triton_kernels.backend import Triton

__all__ = ["BACKENDS", "Backend", "BackendUnavailable", "InputTransform", "describe", "many_floats", "select"]


class BackendUnavailable(RuntimeError):
    """A forced backend can't run here; the message says why and what could."""


class Reference(Backend):
    """Exact integer sums; slow."""

    def linear(self, x_MK, prepared, bias, spec, transform=None, gelu=False):
        return reference.linear(x_MK, prepared, bias, spec)


class Dequantize(Backend):
    """One float product on weights unpacked at every call."""

    def linear(self, x_MK, prepared, bias, spec, transform=None, gelu=False):
        return dense.linear(x_MK, prepared.dequantize(spec, x_MK.dtype), bias, spec)


class Expanded(Backend):
    """One float product on weights unpacked once."""

    def prepare(self, weight, spec, dtype):
        return weight.dequantize(spec, dtype)

    def linear(self, x_MK, prepared, bias, spec, transform=None, gelu=False):
        return dense.linear(x_MK, prepared, bias, spec)


class IntMM(Backend):
    """torch's int8 product, one call a group."""

    def refusal(self, spec, device):
        if spec.in_features % (spec.group_size or spec.in_features + 1) == 1 or spec.in_features == 1:
            return "torch's CPU product is wrong for groups of one column"
        if device.type == "cuda" and (spec.out_features % 8 or (spec.group_size or spec.in_features) % 8 or spec.in_features % 8):
            return f"the CUDA kernel needs multiples of 8; this layer is {spec.in_features}×{spec.out_features} in groups of {spec.group_size}"
        return None if device.type in ("cpu", "cuda") else f"no int8 product on {device.type}"

    def prepare(self, weight, spec, dtype):
        return int_mm.prepare(weight, spec)

    def linear(self, x_MK, prepared, bias, spec, transform=None, gelu=False):
        if x_MK.is_cuda and x_MK.shape[0] <= 16:  # below that the CUDA kernel refuses
            padded = torch.nn.functional.pad(x_MK, (0, 0, 0, 17 - x_MK.shape[0]))
            return int_mm.linear(padded, prepared, bias, spec)[: x_MK.shape[0]]
        return int_mm.linear(x_MK, prepared, bias, spec)


BACKENDS = {
    backend.name: backend
    for backend in (
        Cpu("cpu", "integer products in C with AMX, AVX512-VNNI or AVX2, compiled at first use; codes stay packed"),
        Reference("reference", "exact integer sums in plain torch; slow, the oracle of the others"),
        IntMM("int_mm", "torch's int8 matrix product, one call a group; weight-only layers run as expanded"),
        Expanded("expanded", "weights unpacked once to the model's dtype, then one matrix product"),
        Dequantize("dequantize", "weights unpacked at each call, then one matrix product; smallest memory"),
        Triton("triton", "integer products in groups on NVIDIA cards, 4-bit weights too; not yet timed on any, so never chosen unasked"),
    )
}


def select(spec: LinearSpec, device: torch.device, name: str | None = None, tokens: int | None = None) -> Backend:
    """The backend for `spec` on `device`: `name`, else DITE_BACKEND, else auto's choice, which may depend on how many `tokens` there are at a time.

    Raises BackendUnavailable.
    """
    name = name or os.environ.get("DITE_BACKEND") or "auto"
    if name not in ("auto", *BACKENDS):
        raise BackendUnavailable(f"no backend named {name}; use auto, {', '.join(BACKENDS)}")
    if name == "auto":
        if device.type != "cpu":
            return BACKENDS["dequantize"]
        return BACKENDS["expanded" if many_floats(spec, tokens) or BACKENDS["cpu"].refusal(spec, device) else "cpu"]
    if name in ("int_mm", "triton") and spec.activation_bits is None:  # floats have no integer product, and every recipe has such layers
        return BACKENDS["expanded" if device.type == "cpu" else "dequantize"]
    reason = BACKENDS[name].refusal(spec, device)
    if reason:
        raise BackendUnavailable(f"backend {name} can't run this layer: {reason}; use auto, or one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def many_floats(spec: LinearSpec, tokens: int | None) -> bool:
    """Whether a weight-only layer sees so many tokens that a float product on a weight unpacked beforehand is many times faster."""
    return spec.activation_bits is None and (tokens or 0) > FEW_TOKENS


def describe() -> list[dict[str, Any]]:
    """One row a backend for `dite doctor`: name, ok, reason."""
    found = {backend: backend.unavailable() for backend in BACKENDS.values()}
    return [{"name": backend.name, "ok": why is None, "reason": why or backend.describe()} for backend, why in found.items()]
