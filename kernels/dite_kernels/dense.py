"""Quantized linears through one ordinary matrix product: both sides' codes as the values they stand for.

    y[m, n] = Σ_k (x_code − x_zero) · x_scale[m] · w_value[n, k] + bias

The codes are the reference's. Beyond it, activations and weights are rounded to the model's dtype once, and the product sums in fp32. It is the
fast path wherever float matrix units are as fast as integer ones and groups are short. What it costs is memory passes over the activations, so
these are few, in place, and avoid what torch does slowly on CPUs (a joint min and max along rows; clamping by tensors).
"""

import torch
import torch.nn.functional as F

from dite_kernels import affine
from dite_kernels.quant_tensor import LinearSpec


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, spec: LinearSpec) -> torch.Tensor:
    """y [M, N] in x's dtype, from the dequantized weight in the same dtype."""
    values = x_MK if spec.activation_bits is None else quantize_dequantize(x_MK, spec)
    return F.linear(values, weight_NK, None if bias is None else bias.to(x_MK.dtype))


def quantize_dequantize(x_MK: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
    """The values [M, K] that the codes of `affine.quantize` stand for, in x's dtype."""
    grouped = affine.to_groups(x_MK.float(), spec.activation_group_size)
    scale, zero = affine.ranges(grouped, spec.activation_bits, spec.activation_symmetric)
    scale, zero = scale[..., None], zero[..., None]
    codes = (grouped / scale).round_().add_(zero).clamp_(0, 2**spec.activation_bits - 1)
    return affine.from_groups(codes.sub_(zero).mul_(scale), x_MK.shape[1]).to(x_MK.dtype)
