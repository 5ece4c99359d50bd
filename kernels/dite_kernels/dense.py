"""Quantized linears through one ordinary matrix product: the codes' values as floats, the activations as exact integers.

    y[m, n] = x_scale[m] · Σ_k (x_code − x_zero) · w_value[n, k] + bias

|x_code − x_zero| ≤ 255 is exact even in bf16, so with one scale a token the only rounding beyond the reference's is that of `w_value` to the
model's dtype and that of the product to the same. Per-(token, group) scales are multiplied into the activations, which rounds those too.
It is the fast path wherever float matrix units are as fast as integer ones and groups are short.
"""

import torch
import torch.nn.functional as F

from dite_kernels import affine
from dite_kernels.quant_tensor import LinearSpec


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, spec: LinearSpec) -> torch.Tensor:
    """y [M, N] in x's dtype, from the dequantized weight in the same dtype."""
    if spec.activation_bits is None:
        return F.linear(x_MK, weight_NK, bias)
    integers, scale = _integers(x_MK, spec)
    if spec.activation_per_group and spec.groups > 1:
        values = affine.from_groups(integers * scale[..., None], x_MK.shape[1])
        return F.linear(values.to(x_MK.dtype), weight_NK, bias)
    integers = affine.from_groups(integers, x_MK.shape[1])
    y = F.linear(integers.to(x_MK.dtype), weight_NK).float().mul_(scale)
    return (y if bias is None else y.add_(bias)).to(x_MK.dtype)


def _integers(x_MK: torch.Tensor, spec: LinearSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """code − zero_point as fp32 [M, G, g], and the scales [M, G]; the same roundings as `affine.quantize`, without going through uint8."""
    levels = 2**spec.activation_bits - 1
    grouped = affine.to_groups(x_MK.float(), spec.activation_group_size)
    low, high = grouped.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / (levels // 2) if spec.activation_symmetric else (high - low) / levels
    scale = torch.where(scale == 0, 1.0, scale)
    integers = (grouped / scale[..., None]).round_()
    if spec.activation_symmetric:
        return integers.clamp_(-(levels // 2) - 1, levels // 2), scale
    zero = (-low / scale).round_().clamp_(0, levels)[..., None]
    return torch.clamp(integers, -zero, levels - zero, out=integers), scale
