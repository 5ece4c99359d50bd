"""Quantized linears by torch's int8 matrix product, one call a group.

    Σ (x − zx)(w − zw) = Σ x·w − zw·Σx − zx·Σw + g·zx·zw        x, w shifted to int8, all sums exact

Worth it with few groups a row; with many, the fp32 epilogue of each group costs more than the product saves.
"""

from dataclasses import dataclass

import torch

from dite_kernels import affine
from dite_kernels.quant_tensor import LinearSpec, QuantTensor


@dataclass(frozen=True)
class Int8Weight:
    """Codes shifted to int8, a contiguous [g, N] slice a group, with their column sums and zero points int32 [G, N]."""

    slices: list[torch.Tensor]
    sums: torch.Tensor
    zeros: torch.Tensor
    scale: torch.Tensor


def prepare(weight: QuantTensor, spec: LinearSpec) -> Int8Weight:
    """Unpack and shift a weight once."""
    codes = weight.codes(spec).to(torch.int16) - 128
    slices = [part.to(torch.int8).t().contiguous() for part in codes.split(spec.group_size or spec.in_features, dim=1)]
    sums = torch.stack([part.sum(0, dtype=torch.int32) for part in slices])
    return Int8Weight(slices, sums, weight.zeros(spec).t().to(torch.int32) - 128, weight.scale.float().t().contiguous())


def linear(x_MK: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, spec: LinearSpec) -> torch.Tensor:
    """y [M, N] in x's dtype; integer sums equal the reference's exactly, the epilogue adds groups in the same order."""
    x = affine.quantize(x_MK, spec.activation_bits, spec.activation_group_size, spec.activation_symmetric)
    shifted = (x.codes.to(torch.int16) - 128).to(torch.int8)
    x_zeros = (x.zero_point.to(torch.int32) - 128).expand(-1, spec.groups)
    x_scales = x.scale.expand(-1, spec.groups)
    y = torch.zeros(x_MK.shape[0], spec.out_features, device=x_MK.device)
    start = 0
    for group, part in enumerate(weight.slices):
        columns = shifted[:, start : start + part.shape[0]].contiguous()
        start += part.shape[0]
        accumulator = torch._int_mm(columns, part)
        x_zero, w_zero = x_zeros[:, group, None], weight.zeros[group]
        accumulator -= columns.sum(1, keepdim=True, dtype=torch.int32) * w_zero
        accumulator -= x_zero * (weight.sums[group] - part.shape[0] * w_zero)
        y += accumulator.float() * (x_scales[:, group, None] * weight.scale[group])
    return (y if bias is None else y + bias.float()).to(x_MK.dtype)
