"""The codecs of `dite_kernels.codec` in C: the same bytes, about as fast as memory is read and written. csrc/residual.c has the kernels.

Tensors are read where they are, whatever their leading strides: the reference of a gather is one [B, L, C] tensor, and a rank's tokens are a view.
"""

import ctypes
import math

import torch

from dite_kernels import codec
from dite_kernels.codec import Payload, Prediction
from dite_kernels.cpu import build
from dite_kernels.cpu.packed import BFLOAT16, FLOAT32

TYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: 2}
MOST_DIMENSIONS = 3
FEW_ELEMENTS = 2**15  # up to here one thread is done before others have woken up
Strides = ctypes.c_int64 * 2


class CResidual(ctypes.Structure):
    """`Residual` of csrc/residual.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "ref", "delta", "beta", "codes", "scale")),
        *((name, ctypes.c_int64) for name in ("samples", "tokens", "columns")),
        *((name, Strides) for name in ("x_strides", "ref_strides", "delta_strides")),
        *((name, ctypes.c_int32) for name in ("x_type", "ref_type", "bits", "threads")),
    ]


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can read these as they are: fp32, bf16 or fp16 on the CPU, up to 3 dimensions, the last with stride 1."""
    for tensor in tensors:
        if tensor.dtype not in TYPES or not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_neg():
            return False
        if not 1 <= tensor.ndim <= MOST_DIMENSIONS or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
            return False
    return True


@torch.compiler.disable
def encode_into(out: Payload, x: torch.Tensor, ref: torch.Tensor, kind: str, prediction: Prediction | None = None) -> None:
    """`codec.encode`, its bytes written to `out`. `payload_places` says what may be handed over as codes and scale. Raises build.Unavailable."""
    if x.shape != ref.shape:
        raise ValueError(f"x is {tuple(x.shape)} and its reference {tuple(ref.shape)}; they must agree")
    call = _call(out, ref, kind, prediction)
    _give(call, "x", x)
    call.x_type = TYPES[x.dtype]
    build.library().dite_encode_residual(ctypes.byref(call))


@torch.compiler.disable
def decode_add_(ref: torch.Tensor, payload: Payload, kind: str, prediction: Prediction | None = None) -> None:
    """`codec.decode_add_`. Raises build.Unavailable, and ValueError for tensors that lie upon themselves."""
    for tensor in (ref, prediction.delta) if prediction else (ref,):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"a tensor of strides {tensor.stride()} has several elements in one place and can't be changed; clone it")
    call = _call(payload, ref, kind, prediction)
    build.library().dite_decode_residual(ctypes.byref(call))


def payload_places(payload: Payload, shape: torch.Size, kind: str) -> tuple[int, int]:
    """Addresses of codes and scale for a residual of `shape`: uint8 in one piece, and fp16 or its bytes as uint8; views of a packet, at any offset,
    of any shape. Raises ValueError for others."""
    codes, scale = (math.prod(part) for part in codec.payload_shapes(shape, kind))
    wanted = ((payload.codes, (torch.uint8,), codes), (payload.scale, (torch.float16, torch.uint8), 2 * scale))
    for part, dtypes, size in wanted:
        if part.dtype not in dtypes or part.nbytes != size or not part.is_contiguous() or part.device.type != "cpu":
            raise ValueError(
                f"{kind} codes and scale of {tuple(shape)} are {codes} and {2 * scale} contiguous bytes; "
                f"one is {part.dtype} {tuple(part.shape)} with strides {part.stride()} on {part.device}"
            )
    return payload.codes.data_ptr(), payload.scale.data_ptr()


def _call(payload: Payload, ref: torch.Tensor, kind: str, prediction: Prediction | None) -> CResidual:
    """All but x."""
    call = CResidual()
    _give(call, "ref", ref)
    call.codes, call.scale = payload_places(payload, ref.shape, kind)
    call.bits = codec.BITS[kind]
    leading = tuple(ref.shape[:-1])
    call.samples, call.tokens = leading + (1,) * (MOST_DIMENSIONS - ref.ndim)
    call.columns = ref.shape[-1]
    call.ref_type = TYPES[ref.dtype]
    if prediction:
        prediction.check(ref)
        if not takes(prediction.beta) or not prediction.beta.is_contiguous():
            raise ValueError("beta must be contiguous on the CPU")
        _give(call, "delta", prediction.delta)
        call.beta = prediction.beta.data_ptr()
    call.threads = torch.get_num_threads() if ref.numel() > FEW_ELEMENTS else 1
    return call


def _give(call: CResidual, name: str, tensor: torch.Tensor) -> None:
    """Where it is, and the strides of its samples and tokens."""
    if not takes(tensor):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; the CPU codec takes up to "
            f"{MOST_DIMENSIONS} dimensions of {', '.join(map(str, TYPES))} on the CPU, the last with stride 1"
        )
    setattr(call, name, tensor.data_ptr())
    setattr(call, f"{name}_strides", Strides(*tensor.stride()[:-1]))
