"""`dite_kernels.affine.quantize` on a tile in registers.

Two things differ from the obvious code, and both keep results equal to the reference, bit for bit:
- `min` and `max` of Triton skip NaN; the reference's don't. So NaN is looked for separately.
- Triton has no rounding to even that its interpreter knows. Adding 1.5 · 2^23 leaves no bits for a fraction, so the addition itself rounds (to even);
  a quotient by its own range's scale is far below 2^22, where this holds.
"""

import triton
import triton.language as tl

NAN = tl.constexpr(float("nan"))
NO_FRACTION = tl.constexpr(12582912.0)


@triton.jit
def round_to_even(x):
    """Whole numbers in fp32, for |x| < 2^22."""
    return (x + NO_FRACTION) - NO_FRACTION


@triton.jit
def widen(low, high, has_nan, tile):
    """The range (low ≤ 0 ≤ high) and the NaN flag of rows, once `tile` [rows, columns, more] joined along its last axis."""
    low = tl.minimum(low, tl.min(tile, axis=2))
    high = tl.maximum(high, tl.max(tile, axis=2))
    return low, high, tl.maximum(has_nan, tl.max((tile != tile).to(tl.int32), axis=2))


@triton.jit
def scale_and_zero(low, high, has_nan, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """fp32 scale and whole fp32 zero point of ranges; the zero point is NaN where the reference's is."""
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-low, high), tl.full(low.shape, LEVELS // 2, tl.float32))
    else:
        scale = tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.where(has_nan > 0, NAN, scale)
    if SYMMETRIC:
        zero = tl.full(low.shape, LEVELS // 2 + 1, tl.float32)
    else:
        ratio = tl.div_rn(-low, scale)
        zero = tl.where(ratio == ratio, tl.minimum(round_to_even(ratio), LEVELS), NAN)
    return scale, zero


@triton.jit
def to_codes(x, scale, zero, LEVELS: tl.constexpr, SHIFT: tl.constexpr):
    """int32 codes minus SHIFT; values whose code is not a number get code 0."""
    code = round_to_even(tl.div_rn(x, scale)) + zero
    code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), LEVELS), 0.0)
    return code.to(tl.int32) - SHIFT


@triton.jit
def whole(zero):
    """A zero point as uint8; 0 where it is NaN."""
    return tl.where(zero == zero, zero, 0.0).to(tl.int32).to(tl.uint8)
