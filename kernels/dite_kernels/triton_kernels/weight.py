"""A quantized weight as the product kernel reads it: repacked once, when a layer is loaded.

4-bit codes stay 4 bits if groups have 64 columns or more; a program turns them into int8 in registers, with the zero point subtracted (w − z fits).
All other codes become int8 here: w − z where that fits (6 bits, and symmetric 8 bits), else w − 128 with the remaining zero point z − 128 beside it.

Each group is padded with zeros to a multiple of what a program reads at once, so that weights are read without masks whatever K and the group size:

    int8    [N, G · P]       P padded columns of a group
    4 bits  [N, G · P / 2]   in units of 2·D columns: byte j holds column j in its low nibble, column D + j in its high one (padding: the zero point)

so that each nibble of a tile of bytes is a tile of D consecutive columns, and no nibble has to change its place. D is the depth of one product.
Shape letters: N out features, K in features, G groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dite_kernels import affine
from dite_kernels.quant_tensor import LinearSpec, QuantTensor

LEAST_DEPTH = 32  # columns that one product of int8 needs on the matrix unit
LEAST_GROUP_OF_NIBBLES = 2 * LEAST_DEPTH
MOST_COLUMNS = 128  # of a group that a program reads at once


@dataclass(frozen=True)
class TritonWeight:
    """qdata int8 [N, G·P] or uint8 [N, G·P/2]; scale [G, N] as stored; sums int32 [G, N] of w − z over a group's columns.

    `zero` [G, N]: uint8 with 4-bit codes, int8 (z − 128) with asymmetric 8-bit ones, None where it is already subtracted.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor
    zero: torch.Tensor | None
    packs_nibbles: bool
    depth: int

    @property
    def padded_group(self) -> int:
        return self.qdata.shape[1] * (2 if self.packs_nibbles else 1) // self.scale.shape[0]

    def dequantize(self, spec: LinearSpec, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that the codes stand for."""
        integers = self._integers(spec)[..., : affine.group_width(spec.in_features, spec.group_size)]
        if self.zero is not None:
            integers = integers - self.zero.t()[..., None].float()
        return affine.from_groups(integers * self.scale.t()[..., None].float(), spec.in_features).to(dtype)

    def _integers(self, spec: LinearSpec) -> torch.Tensor:
        """fp32 [N, G, P]."""
        if self.packs_nibbles:
            units = self.qdata.unflatten(1, (-1, 1, self.depth))
            codes = torch.cat([units & 15, units >> 4], 2)
        else:
            codes = self.qdata
        return codes.reshape(spec.out_features, spec.groups, self.padded_group).float()


def prepare(weight: QuantTensor, spec: LinearSpec) -> TritonWeight:
    """Repack a weight."""
    codes = affine.to_groups(weight.codes(spec), spec.group_size).to(torch.int16)
    zeros = weight.zeros(spec).to(torch.int16)
    width = codes.shape[2]
    missing = spec.groups * width - spec.in_features
    if missing:
        codes[:, -1, -missing:] = zeros[:, -1, None]
    sums = (codes - zeros[..., None]).sum(2, dtype=torch.int32)
    scale, sums = weight.scale.t().contiguous(), sums.t().contiguous()
    if spec.weight_bits == 4 and width >= LEAST_GROUP_OF_NIBBLES:
        depth = _depth(width, 2)
        filled = torch.cat([codes, zeros[..., None].expand(-1, -1, -width % (2 * depth))], 2)
        low, high = filled.flatten(1).unflatten(1, (-1, 2, depth)).unbind(2)
        qdata = (low | (high << 4)).to(torch.uint8).flatten(1).contiguous()
        return TritonWeight(qdata, scale, sums, zeros.t().to(torch.uint8).contiguous(), True, depth)
    depth = _depth(width, 1)
    shifts = spec.weight_bits == 8 and not spec.weight_symmetric
    integers = codes - 128 if shifts else codes - zeros[..., None]
    if shifts and missing:
        integers[:, -1, -missing:] = 0
    qdata = F.pad(integers.to(torch.int8), (0, -width % depth)).flatten(1).contiguous()
    zero = (zeros - 128).t().to(torch.int8).contiguous() if shifts else None
    return TritonWeight(qdata, scale, sums, zero, False, depth)


def _depth(width: int, tiles: int) -> int:
    """The deepest product (columns) for a group of `width` that is read `tiles` at a time: one that pads by less than an eighth, else the least."""
    for columns in (MOST_COLUMNS, MOST_COLUMNS // 2):
        if -width % columns * 8 < width:
            return max(LEAST_DEPTH, columns // tiles)
    return LEAST_DEPTH
