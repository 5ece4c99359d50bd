"""The exact quantized linear, slow and obvious: the oracle of every backend.

    acc[m, n, g] = Σ_{k in g} (x_code − x_zero) · (w_code − w_zero)          exact integers (int32)
    y[m, n]      = Σ_g acc[m, n, g] · (x_scale[m, g] · w_scale[n, g]) + bias  fp32, groups in order

The integer sums are computed by fp64 matrix products, which are exact below 2^53 (and, unlike int32 ones, fast), then checked by their type:
|acc| ≤ 255² · g fits int32 for groups of up to 33,025 columns. A row's result never depends on the other rows.
Shape letters: M tokens, N out features, K in features, G groups.
"""

import torch
import torch.nn.functional as F

from dite_kernels import affine
from dite_kernels.quant_tensor import LinearSpec, QuantTensor

MAX_GROUP = (2**31 - 1) // 255**2


def accumulate(x_codes: torch.Tensor, x_zero: torch.Tensor, weight: QuantTensor, spec: LinearSpec) -> torch.Tensor:
    """int32 accumulators [G, M, N] from activation codes uint8 [M, K] and their zero points [M, 1 or G]."""
    width = affine.group_width(spec.in_features, spec.group_size)
    if width > MAX_GROUP:
        raise ValueError(f"a group of {width} columns can overflow int32; use groups of at most {MAX_GROUP}")
    # Padding is written as "code equals zero point", so that a short last group adds nothing.
    x = affine.to_groups(x_codes, spec.group_size).double() - x_zero.double()[..., None]
    w = affine.to_groups(weight.codes(spec), spec.group_size).double() - weight.zeros(spec).double()[..., None]
    tail = spec.groups * width - spec.in_features
    if tail:
        w[:, -1, -tail:] = 0
    return torch.einsum("mgk,ngk->gmn", x, w).to(torch.int32)


def linear(x_MK: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None, spec: LinearSpec) -> torch.Tensor:
    """y [M, N] in x's dtype; activations quantized per token or per (token, group), or left alone when weight-only."""
    if spec.activation_bits is None:
        y = F.linear(x_MK.float(), weight.dequantize(spec))
    else:
        x = affine.quantize(x_MK, spec.activation_bits, spec.activation_group_size, spec.activation_symmetric)
        accumulators = accumulate(x.codes, x.zero_point, weight, spec)
        x_scale = x.scale.expand(-1, spec.groups)
        y = torch.zeros(accumulators.shape[1:], device=x_MK.device)
        for group, accumulator in enumerate(accumulators):
            y += accumulator.float() * (x_scale[:, group, None] * weight.scale[:, group].float())
    if bias is not None:
        y = y + bias.float()
    return y.to(x_MK.dtype)
