"""The residual codecs of `dite_kernels.codec`, one pass over memory each: encode with the reference update, and decode with it.

Payloads and updated references equal the reference codec's, bit for bit: its sums are over integers, so that no order of a reduction matters, and the
launches forbid fused multiply-adds. A program takes some groups of 64; groups of all rows are counted through.
Shape letters: S slots (all leading dimensions), n elements of a slot, G groups of a slot.
"""

import torch
import triton
import triton.language as tl

from dite_kernels import affine, codec
from dite_kernels.codec import Payload

GROUPS = 32  # of a program: 2048 values, 16 a thread
WARPS = 4
GROUP = tl.constexpr(codec.GROUP)
LOW, HIGH = tl.constexpr(codec.LEVELS[2]), tl.constexpr(codec.LEVELS[3])
THRESHOLD = tl.constexpr(codec.THRESHOLD)
SMALLEST = tl.constexpr(codec.SMALLEST)
FP16_MAX = tl.constexpr(affine.FP16_MAX)
NO_FRACTION = tl.constexpr(12582912.0)  # adding 1.5 · 2^23 rounds to even; see `rounding`


def encode_(x: torch.Tensor, ref: torch.Tensor, kind: str, out: Payload | None = None) -> Payload:
    """`codec.encode(x, ref, kind)` followed by `codec.decode_add_(ref, payload, kind)`. `out` may be views of a buffer that is about to be sent."""
    if x.shape != ref.shape:
        raise ValueError(f"x is {tuple(x.shape)} and its reference {tuple(ref.shape)}; they must agree")
    shapes = codec.payload_shapes(x.shape, kind)
    if out is None:
        dtypes = (torch.uint8, torch.float16)
        out = Payload(*(torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in zip(shapes, dtypes, strict=True)))
    _check(ref, out, shapes)
    encode_residual(x.contiguous(), ref, *out, codec.BITS[kind])
    return out


def decode_add_(ref: torch.Tensor, payload: Payload, kind: str) -> None:
    """`codec.decode_add_`, over all slots at once."""
    _check(ref, payload, codec.payload_shapes(ref.shape, kind))
    decode_residual(ref, *payload, codec.BITS[kind])


def _check(ref: torch.Tensor, payload: Payload, shapes: tuple) -> None:
    found = tuple(tuple(part.shape) for part in payload)
    if found != shapes:
        raise ValueError(f"codes and scale are {found}; a residual of {tuple(ref.shape)} needs {shapes}")
    if not all(part.is_contiguous() for part in (ref, *payload)):
        raise ValueError("a reference and its payload are changed in place and must be contiguous")


@torch.library.custom_op("dite_kernels::encode_residual", mutates_args=("ref", "codes", "scale"))
def encode_residual(x: torch.Tensor, ref: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """The operator behind `encode_`."""
    total = scale.numel()
    if total:
        with torch.cuda.device_of(ref):  # Triton launches on the current device
            _encode[(triton.cdiv(total, GROUPS),)](
                x, ref, codes, scale, x.shape[-1], scale.shape[-1], total, BITS=bits, GROUPS=GROUPS, num_warps=WARPS, enable_fp_fusion=False
            )


@torch.library.custom_op("dite_kernels::decode_residual", mutates_args=("ref",))
def decode_residual(ref: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """The operator behind `decode_add_`."""
    total = scale.numel()
    if total:
        with torch.cuda.device_of(ref):  # Triton launches on the current device
            _decode[(triton.cdiv(total, GROUPS),)](
                ref, codes, scale, ref.shape[-1], scale.shape[-1], total, BITS=bits, GROUPS=GROUPS, num_warps=WARPS, enable_fp_fusion=False
            )


@encode_residual.register_fake
def _(x, ref, codes, scale, bits):
    return None


@decode_residual.register_fake
def _(ref, codes, scale, bits):
    return None


@triton.jit
def _encode(x_ptr, ref_ptr, codes_ptr, scale_ptr, n, G, total, BITS: tl.constexpr, GROUPS: tl.constexpr):
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = groups < total
    offsets, inside, count = _places(groups, live, n, G)
    ref = tl.load(ref_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - ref
    # inf − inf is NaN and NaN times 0 is NaN: one test finds both.
    finite = tl.max((d * 0.0 != 0.0).to(tl.int32), axis=1) == 0
    d = tl.where(finite[:, None], d, 0.0)
    half = _to_half(tl.minimum(_scale(d, count, BITS), FP16_MAX), BITS)
    scale = half.to(tl.float32)
    codes = _codes(d, scale[:, None], BITS)
    tl.store(scale_ptr + groups, tl.where(finite, half, float("nan")), mask=live)
    per_byte: tl.constexpr = 8 // BITS
    size: tl.constexpr = GROUP // per_byte
    shifts = tl.arange(0, per_byte) * BITS
    packed = tl.sum(tl.reshape(codes, [GROUPS, size, per_byte]) << shifts[None, None, :], axis=2)
    places = groups.to(tl.int64)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(codes_ptr + places, packed.to(tl.uint8), mask=live[:, None])
    change = tl.where(finite[:, None], _values(codes, BITS) * scale[:, None], float("nan"))
    tl.store(ref_ptr + offsets, (ref + change).to(ref_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decode(ref_ptr, codes_ptr, scale_ptr, n, G, total, BITS: tl.constexpr, GROUPS: tl.constexpr):
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = groups < total
    offsets, inside, _count = _places(groups, live, n, G)
    ref = tl.load(ref_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + groups, mask=live, other=0.0).to(tl.float32)
    per_byte: tl.constexpr = 8 // BITS
    size: tl.constexpr = GROUP // per_byte
    places = groups.to(tl.int64)[:, None] * size + tl.arange(0, size)[None, :]
    packed = tl.load(codes_ptr + places, mask=live[:, None], other=0).to(tl.int32)
    shifts = tl.arange(0, per_byte) * BITS
    codes = tl.reshape((packed[:, :, None] >> shifts[None, None, :]) & (2**BITS - 1), [GROUPS, GROUP])
    ref += _values(codes, BITS) * scale[:, None]
    tl.store(ref_ptr + offsets, ref.to(ref_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _places(groups, live, n, G):
    """Offsets [groups, 64] of their elements, which of them exist, and how many each group has (fp32)."""
    slot = groups // G
    start = (groups - slot * G) * GROUP
    within = tl.arange(0, GROUP)
    inside = live[:, None] & (start[:, None] + within[None, :] < n)
    offsets = slot.to(tl.int64)[:, None] * n + start[:, None] + within[None, :]
    return offsets, inside, tl.minimum(n - start, GROUP).to(tl.float32)


@triton.jit
def _round(x):
    return (x + NO_FRACTION) - NO_FRACTION


@triton.jit
def _scale(d, count, BITS: tl.constexpr):
    """The fp32 scale of each group of finite values."""
    largest = tl.max(tl.abs(d), axis=1)
    if BITS >= 4:
        return tl.div_rn(largest, tl.full(largest.shape, 2 ** (BITS - 1) - 1, tl.float32))
    if BITS == 2:
        step = tl.div_rn(tl.full(largest.shape, 2.0**12, tl.float32), tl.maximum(largest, SMALLEST))
        q = _round(tl.abs(d) * step[:, None]).to(tl.int32)
        return tl.div_rn(tl.sqrt_rn(tl.div_rn(tl.sum(q * q, axis=1).to(tl.float32), count)), step)
    step = tl.div_rn(tl.full(largest.shape, 2.0**15, tl.float32), tl.maximum(largest, SMALLEST))
    q = _round(tl.abs(d) * step[:, None]).to(tl.int32)
    return tl.div_rn(tl.sum(q, axis=1).to(tl.float32), step * count)


@triton.jit
def _to_half(scale, BITS: tl.constexpr):
    half = scale.to(tl.float16)
    if BITS >= 4:
        above = (half.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
        half = tl.where(half.to(tl.float32) < scale, above, half)
    return half


@triton.jit
def _codes(d, scale, BITS: tl.constexpr):
    if BITS == 1:
        return (d >= 0).to(tl.int32)
    if BITS == 2:
        edge = scale * THRESHOLD
        return (d >= -edge).to(tl.int32) + (d >= 0).to(tl.int32) + (d >= edge).to(tl.int32)
    most: tl.constexpr = 2 ** (BITS - 1) - 1
    inverse = tl.where(scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0)
    return _round(tl.minimum(tl.maximum(d * inverse, -most), most)).to(tl.int32) + (most + 1)


@triton.jit
def _values(codes, BITS: tl.constexpr):
    """D(codes) / s, fp32."""
    if BITS == 1:
        return tl.where(codes > 0, 1.0, -1.0)
    if BITS == 2:
        size = tl.where((codes == 0) | (codes == 3), HIGH, LOW)
        return tl.where(codes >= 2, size, -size)
    return (codes - 2 ** (BITS - 1)).to(tl.float32)
