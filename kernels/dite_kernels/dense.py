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
        return F.linear(x_MK, weight_NK, None if bias is None else bias.to(x_MK.dtype))
    integers, scale = _integers(x_MK, spec)
    if spec.activation_per_group and spec.groups > 1:
        values = affine.from_groups(integers * scale[..., None], x_MK.shape[1])
        return F.linear(values.to(x_MK.dtype), weight_NK, None if bias is None else bias.to(x_MK.dtype))
    integers = affine.from_groups(integers, x_MK.shape[1])
    if x_MK.dtype == torch.float16:  # sums of raw integers pass 65504; k/256 is exact in fp16 for |k| ≤ 255
        integers, scale = integers / 256, scale * 256
    y = F.linear(integers.to(x_MK.dtype), weight_NK).float() * scale
    return (y if bias is None else y + bias.float()).to(x_MK.dtype)


def _integers(x_MK: torch.Tensor, spec: LinearSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """code − zero_point as fp32 [M, G, g], and the scales [M, G]: `affine.quantize`, without going through uint8."""
    grouped = affine.to_groups(x_MK.float(), spec.activation_group_size)
    scale, zero = affine.ranges(grouped, spec.activation_bits, spec.activation_symmetric)
    zero = zero[..., None]
    return torch.clamp((grouped / scale[..., None]).round(), -zero, 2**spec.activation_bits - 1 - zero), scale
