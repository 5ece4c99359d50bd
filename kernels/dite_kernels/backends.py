"""What can run a quantized linear here, and which one does.

`DITE_BACKEND=name` or `select(spec, device, name)` forces one, and fails if it can't do the job. Otherwise:

    CPU    expanded: weights are unpacked once, to the model's dtype; spends memory for speed
    CUDA   dequantize: weights are unpacked at each call; memory stays small
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from dite_kernels import backend_triton, dense, int_mm, reference
from dite_kernels.quant_tensor import LinearSpec, QuantTensor


class BackendUnavailable(RuntimeError):
    """A forced backend can't run here; the message says why and what could."""


@dataclass(frozen=True)
class Backend:
    """One way to compute y = x·Wᵀ + b from a packed weight."""

    name: str
    summary: str

    def refusal(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why this backend can't run `spec` on `device`, or None."""
        return None

    def prepare(self, weight: QuantTensor, spec: LinearSpec, dtype: torch.dtype) -> Any:
        """Whatever `linear` wants kept between calls."""
        return weight

    def linear(self, x_MK: torch.Tensor, prepared: Any, bias: torch.Tensor | None, spec: LinearSpec) -> torch.Tensor:
        """y [M, N] in x's dtype."""
        raise NotImplementedError(self.name)


class Reference(Backend):
    """Exact integer sums; slow."""

    def linear(self, x_MK, prepared, bias, spec):
        return reference.linear(x_MK, prepared, bias, spec)


class Dequantize(Backend):
    """One float product on weights unpacked at every call."""

    def linear(self, x_MK, prepared, bias, spec):
        return dense.linear(x_MK, prepared.dequantize(spec, x_MK.dtype), bias, spec)


class Expanded(Backend):
    """One float product on weights unpacked once."""

    def prepare(self, weight, spec, dtype):
        return weight.dequantize(spec, dtype)

    def linear(self, x_MK, prepared, bias, spec):
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

    def linear(self, x_MK, prepared, bias, spec):
        if x_MK.is_cuda and x_MK.shape[0] <= 16:  # below that the CUDA kernel refuses
            padded = torch.nn.functional.pad(x_MK, (0, 0, 0, 17 - x_MK.shape[0]))
            return int_mm.linear(padded, prepared, bias, spec)[: x_MK.shape[0]]
        return int_mm.linear(x_MK, prepared, bias, spec)


BACKENDS = {
    backend.name: backend
    for backend in (
        Reference("reference", "exact integer sums in plain torch; slow, the oracle of the others"),
        IntMM("int_mm", "torch's int8 matrix product, one call a group; weight-only layers run as expanded"),
        Expanded("expanded", "weights unpacked once to the model's dtype, then one matrix product"),
        Dequantize("dequantize", "weights unpacked at each call, then one matrix product; smallest memory"),
        backend_triton.Triton("triton", "integer products in groups on NVIDIA cards, 4-bit weights included"),
    )
}


def select(spec: LinearSpec, device: torch.device, name: str | None = None) -> Backend:
    """The backend for `spec` on `device`: `name`, else DITE_BACKEND, else auto's choice. Raises BackendUnavailable."""
    name = name or os.environ.get("DITE_BACKEND") or "auto"
    if name not in ("auto", *BACKENDS):
        raise BackendUnavailable(f"no backend named {name}; use auto, {', '.join(BACKENDS)}")
    if name == "auto":
        return BACKENDS["expanded" if device.type == "cpu" else "dequantize"]
    if name == "int_mm" and spec.activation_bits is None:
        return BACKENDS["expanded"]  # float activations have no integer product; every recipe has such layers
    reason = BACKENDS[name].refusal(spec, device)
    if reason:
        raise BackendUnavailable(f"backend {name} can't run this layer: {reason}; use auto, or one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def describe() -> list[dict[str, Any]]:
    """One row a backend for `dite doctor`: name, ok, reason."""
    return [{"name": backend.name, "ok": True, "reason": backend.summary} for backend in BACKENDS.values()]
