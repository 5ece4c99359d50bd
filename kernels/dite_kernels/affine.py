"""Affine quantization in groups along the last dimension.

    code  = clamp(round(x / scale) + zero_point, 0, 2^bits − 1)        uint8, round half to even
    value = (code − zero_point) · scale

Shape letters: N rows (output features or tokens), K columns (input features), G groups a row, g columns a group; the last group may be short.
Every range includes 0, so 0 maps to exactly 0 and back: without this, a one-sided group such as [10, 11] collapses to one value. It also makes
padding with zeros harmless, which is how ragged tails are handled. Symmetric codes are unsigned too: their zero point is 2^(bits−1).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

FP16_MIN_NORMAL = 2.0**-14
FP16_MAX = 65504.0


class Quantized(NamedTuple):
    """codes uint8 [N, K]; scale [N, G] float; zero_point uint8 [N, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor


def group_count(columns: int, group_size: int | None) -> int:
    """Groups in a row of `columns`; None means one.

    >>> group_count(1152, 256), group_count(7, None)
    (5, 1)
    """
    return 1 if group_size is None else -(-columns // group_size)


def group_width(columns: int, group_size: int | None) -> int:
    """Columns in a full group: never more than a row has.

    >>> group_width(1152, 256), group_width(7, 16), group_width(7, None)
    (256, 7, 7)
    """
    return max(1, min(group_size or columns, columns))


def to_groups(x_NK: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """[N, K] → [N, G, g], the last group padded with zeros."""
    rows, columns = x_NK.shape
    width = group_width(columns, group_size)
    groups = group_count(columns, group_size)
    padded = F.pad(x_NK, (0, groups * width - columns)) if groups * width > columns else x_NK
    return padded.reshape(rows, groups, width)


def from_groups(x_NGg: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, G, g] → [N, K], the padding dropped."""
    return x_NGg.flatten(1)[:, :columns]


def quantize(x_NK: torch.Tensor, num_bits: int, group_size: int | None, symmetric: bool, half_scales: bool = False) -> Quantized:
    """Round to nearest in groups, in fp32.

    `half_scales` stores fp16 scales, rounded *up* so that a range still covers its extremes and |x − value| ≤ scale/2 keeps holding; scales that
    fp16 would flush or overflow stay fp32. A group of zeros gets scale 1. NaN and inf give a non-finite scale in their own group only.
    """
    grouped = to_groups(x_NK.float(), group_size)
    scale, zero = ranges(grouped, num_bits, symmetric, half_scales)
    wide = scale.float()
    codes = ((grouped / wide[..., None]).round() + zero[..., None]).clamp(0, 2**num_bits - 1)
    # nan_to_num only makes the cast defined: the non-finite scale already poisons the value.
    return Quantized(from_groups(codes.nan_to_num(0).to(torch.uint8), x_NK.shape[1]).contiguous(), scale, zero.nan_to_num(0).to(torch.uint8))


def ranges(grouped: torch.Tensor, num_bits: int, symmetric: bool, half_scales: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (fp32, or fp16 with `half_scales`) and zero point (whole numbers in fp32) of each group [..., g]."""
    levels = 2**num_bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = torch.maximum(-low, high) / (levels // 2) if symmetric else (high - low) / levels
    scale = torch.where(scale == 0, 1.0, scale)
    if half_scales:
        scale = _round_up_to_half(scale)
    zero = torch.full_like(low, levels // 2 + 1) if symmetric else (-low / scale.float()).round().clamp(0, levels)
    return scale, zero


def dequantize(
    codes_NK: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor, group_size: int | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Codes back to values [N, K]: exact integers times the scale in fp32, then one rounding to `dtype`."""
    columns = codes_NK.shape[1]
    integers = to_groups(codes_NK, group_size).float() - zero_NG.float()[..., None]
    return from_groups(integers * scale_NG.float()[..., None], columns).to(dtype)


def _round_up_to_half(scale: torch.Tensor) -> torch.Tensor:
    if not ((scale >= FP16_MIN_NORMAL) & (scale <= FP16_MAX)).all():
        return scale
    half = scale.half()
    # The bits of positive halves are ordered like the numbers: adding one gives the next larger.
    return torch.where(half.float() < scale, (half.view(torch.int16) + 1).view(torch.float16), half)
