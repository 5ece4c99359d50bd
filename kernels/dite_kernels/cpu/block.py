"""What surrounds the linears of a transformer block, on CPUs: LayerNorm with adaLN, gated residuals. Their functions give None where they can't run.

An attention of our own, with AMX, took as long as torch's: there is none.
"""

import ctypes

import torch

from dite_kernels.cpu import build
from dite_kernels.cpu.backend import TYPES


def runs(*tensors: torch.Tensor) -> bool:
    """Whether the kernels here take these: plain tensors of one dtype on the CPU, of which no gradient is wanted."""
    if torch.jit.is_tracing():
        return False
    types = {tensor.dtype for tensor in tensors}
    plain = all(tensor.device.type == "cpu" and not tensor.is_neg() and not (tensor.requires_grad and torch.is_grad_enabled()) for tensor in tensors)
    return plain and len(types) == 1 and types <= TYPES.keys() and _present()


@torch.compiler.disable
def modulate(x_BLC: torch.Tensor, scale_BC: torch.Tensor, shift_BC: torch.Tensor, eps: float) -> torch.Tensor | None:
    """LayerNorm(x) · (1 + scale) + shift, in fp32, rounded once."""
    if not _rows(x_BLC, scale_BC, shift_BC) or scale_BC.stride(0) != shift_BC.stride(0):
        return None
    y = torch.empty_like(x_BLC)
    _call("dite_modulate", (x_BLC, scale_BC, shift_BC, y), scale_BC.stride(0), ctypes.c_float(eps))
    return y


@torch.compiler.disable
def add_gated(x_BLC: torch.Tensor, gate_BC: torch.Tensor, z_BLC: torch.Tensor) -> torch.Tensor | None:
    """x + gate · z, in fp32, rounded once."""
    if z_BLC.shape != x_BLC.shape or not z_BLC.is_contiguous() or not _rows(x_BLC, gate_BC, z=z_BLC):
        return None
    y = torch.empty_like(x_BLC)
    _call("dite_add_gated", (x_BLC, gate_BC, z_BLC, y), gate_BC.stride(0))
    return y


def _rows(x: torch.Tensor, *vectors: torch.Tensor, **more: torch.Tensor) -> bool:
    """Whether x is [B, L, C] in one piece, and the vectors are rows [B, C]."""
    if x.ndim != 3 or not x.is_contiguous() or not runs(x, *vectors, *more.values()):
        return False
    return all(vector.shape == (x.shape[0], x.shape[2]) and vector.stride(1) == 1 for vector in vectors)


def _call(name: str, tensors: tuple[torch.Tensor, ...], stride: int, *more) -> None:
    x = tensors[0]
    sizes = [ctypes.c_int64(size) for size in (*x.shape, stride)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(build.library(), name)(*pointers, *sizes, *more, TYPES[x.dtype], torch.get_num_threads())


def _present() -> bool:
    try:
        build.library()
    except build.Unavailable:
        return False
    return True
