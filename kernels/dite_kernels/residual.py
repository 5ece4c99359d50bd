"""Codecs of residuals, by the fastest implementation that is here: what the exchanges between ranks call. `dite_kernels.codec` has the formulas.

    CPU    cpu: C, compiled at first use for this processor; else the reference
    CUDA   triton, where it is installed, but for predictions; else the reference

All give the same bytes, but for Triton's NaN, whose bits are its own: ranks compare `implementation` before they compare hashes.
`DITE_BACKEND=reference` forces the exact one.
"""

import os

import torch

from dite_kernels import codec
from dite_kernels.codec import Payload, Prediction, payload_shapes
from dite_kernels.cpu import build
from dite_kernels.cpu import residual as cpu
from dite_kernels.triton_kernels.backend import missing

__all__ = ["Payload", "Prediction", "decode_add_", "encode", "implementation", "payload_shapes"]


def implementation(device: torch.device | str = "cpu") -> str:
    """What runs on `device`, and at what level.

    >>> implementation() in ("cpu amx", "cpu avx512_vnni", "cpu avx2", "cpu portable", "reference")
    True
    """
    device = torch.device(device)
    if os.environ.get("DITE_BACKEND") == "reference":
        return "reference"
    if device.type == "cpu":
        found = build.attempt()
        return "reference" if isinstance(found, str) else f"cpu {found.level}"
    return "triton" if device.type == "cuda" and missing(device) is None else "reference"


def encode(x: torch.Tensor, ref: torch.Tensor, kind: str, prediction: Prediction | None = None, out: Payload | None = None) -> Payload:
    """What `x` adds to `ref`, compressed; neither is changed: pass the payload to `decode_add_`, as every receiver does.

    x and ref [..., n] are fp32, bf16 or fp16, each as it likes, and may be views of something larger: with up to 3 dimensions, the last of stride 1,
    they are read where they are. With `out` the bytes are written there, and it is returned: codes uint8 and scale fp16, or its bytes as uint8, each
    in one piece of the size that `payload_shapes` says, at any offset of a packet. Raises ValueError for kinds, shapes and dtypes that don't fit.
    """
    if x.shape != ref.shape:
        raise ValueError(f"x is {tuple(x.shape)} and its reference {tuple(ref.shape)}; they must agree")
    chosen, codes_and_scale = implementation(ref.device), payload_shapes(ref.shape, kind)
    if chosen.startswith("cpu") and cpu.takes(x, ref, *_delta(prediction)):
        if out is None:
            dtypes = (torch.uint8, torch.float16)
            out = Payload(*(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in zip(codes_and_scale, dtypes, strict=True)))
        cpu.encode_into(out, x, ref, kind, prediction)
        return out
    if chosen == "triton" and prediction is None:
        from dite_kernels.triton_kernels import residual as triton

        found = triton.encode_(x, ref.clone(memory_format=torch.contiguous_format), kind)  # it would update the reference
    else:
        found = codec.encode(x, ref, kind, prediction)
    if out is None:
        return found
    for part, place, size in zip(found, out, (1, 2), strict=True):
        _fits(place, size * part.numel())
        place.view(-1).view(torch.uint8).copy_(_bytes(part))
    return out


def decode_add_(ref: torch.Tensor, payload: Payload, kind: str, prediction: Prediction | None = None) -> None:
    """ref ← ref + D(payload), or the prediction's p + D(payload), and its delta ← the change: in place, in one pass.

    A payload is what `encode` gave, or views of a packet as it takes for `out`. Raises ValueError for kinds, shapes and dtypes that don't fit.
    """
    chosen, (codes, scale) = implementation(ref.device), payload_shapes(ref.shape, kind)
    if chosen.startswith("cpu") and cpu.takes(ref, *_delta(prediction)):
        cpu.decode_add_(ref, payload, kind, prediction)
        return
    _fits(payload.codes, torch.Size(codes).numel())
    _fits(payload.scale, 2 * torch.Size(scale).numel())
    halves = _bytes(payload.scale).view(torch.float16)
    payload = Payload(payload.codes.reshape(codes), halves.reshape(scale))
    if chosen != "triton" or prediction is not None:
        codec.decode_add_(ref, payload, kind, prediction)
        return
    from dite_kernels.triton_kernels import residual as triton

    whole = ref.contiguous()
    triton.decode_add_(whole, Payload(*(part.contiguous() for part in payload)), kind)
    if whole is not ref:
        ref.copy_(whole)


def _delta(prediction: Prediction | None) -> tuple[torch.Tensor, ...]:
    return (prediction.delta,) if prediction else ()


def _bytes(part: torch.Tensor) -> torch.Tensor:
    """A copy, uint8 [bytes], at an address that any dtype may have, with strides that may be viewed as any: one element's can be 0."""
    return part.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _fits(part: torch.Tensor, size: int) -> None:
    if part.nbytes != size or not part.is_contiguous():
        raise ValueError(f"{tuple(part.shape)} {part.dtype} with strides {part.stride()} is no place for {size} bytes in one piece")
