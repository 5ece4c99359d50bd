"""A weight in the CPU kernels' layout (csrc/types.h), which takes the place of the layer's own codes: there is no second copy."""

import ctypes
from dataclasses import dataclass

import torch

from dite_kernels import affine, packing
from dite_kernels.quant_tensor import LinearSpec, QuantTensor

COLUMNS = 64  # of a panel
FLOAT32, BFLOAT16 = 0, 1


class CWeight(ctypes.Structure):
    """`Weight` of csrc/types.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out_features", "in_features", "groups", "width", "padded")),
        *((name, ctypes.c_int32) for name in ("bits", "offset", "has_zero")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "sum", "total")),
    ]


class CCall(ctypes.Structure):
    """`Call` of csrc/types.h."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "y", "bias", "smooth", "sign")),
        ("block", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_type", "y_type", "levels", "per_group", "symmetric", "gelu", "threads")),
    ]


@dataclass(frozen=True)
class Packed:
    """`parts` keeps the memory that `weight` points to: codes uint8, and scale, zero, sum, total fp32. `scale`, `zero_point` are the checkpoint's."""

    weight: CWeight
    parts: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def pack(loaded: ctypes.CDLL, tensor: QuantTensor, spec: LinearSpec) -> Packed:
    """Lay a weight out for `loaded`."""
    width = affine.group_width(spec.in_features, spec.group_size)
    step = (32 if width <= 32 else 64 if width <= 64 else 128) if loaded.level == "amx" else 8
    padded, panels = -(-width // step) * step, -(-spec.out_features // COLUMNS)
    bits = 4 if spec.weight_bits == 4 else 8
    zeros = tensor.zeros(spec).contiguous()
    offset = 2 ** (spec.weight_bits - 1)
    facts = panels * spec.groups * COLUMNS
    parts = (
        torch.zeros(facts * padded * bits // 8, dtype=torch.uint8, device="cpu"),
        *(torch.zeros(size, dtype=torch.float32, device="cpu") for size in (facts, facts, facts, panels * COLUMNS)),
    )
    weight = CWeight(
        spec.out_features,
        spec.in_features,
        spec.groups,
        width,
        padded,
        bits,
        offset,
        bits == 8 and bool((zeros != offset).any()),
        *(address(part, part.dtype) for part in parts),
    )
    codes, scale = tensor.codes(spec).contiguous(), tensor.scale.float().contiguous()
    given = address(codes, torch.uint8), address(zeros, torch.uint8), address(scale, torch.float32)
    loaded.dite_pack(ctypes.byref(weight), *given, torch.get_num_threads())
    return Packed(weight, parts, tensor.scale, tensor.zero_point)


def unpack(loaded: ctypes.CDLL, packed: Packed, spec: LinearSpec) -> QuantTensor:
    """The weight that was packed, bit for bit."""
    codes = torch.empty(spec.out_features, spec.in_features, dtype=torch.uint8, device="cpu")
    loaded.dite_unpack(ctypes.byref(packed.weight), address(codes, torch.uint8), torch.get_num_threads())
    return QuantTensor(packing.pack(codes, spec.weight_bits), packed.scale, packed.zero_point)


def address(tensor: torch.Tensor | None, dtype: torch.dtype) -> ctypes.c_void_p:
    """Where the numbers are. Raises ValueError for a tensor that C would misread: there is nobody after this who could notice."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(
            f"the CPU kernels take contiguous {dtype} tensors on the CPU, not {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )
    return ctypes.c_void_p(tensor.data_ptr())
