"""GPTQ: round a weight column by column, and let the columns still to come make up for each one's error (arXiv 2210.17323).

Minimises ‖(W − Ŵ) X‖² for calibration inputs X, given only H = X Xᵀ. Beyond the original: every layer's own group size with a ragged tail, ranges
that include zero, and no column ever dropped: one that calibration never excited is rounded to nearest.

Shapes: weight [N, K], hessian [K, K]; G groups of g columns a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dite_kernels import affine, packing
from dite_kernels.quant_tensor import LinearSpec, QuantTensor

BLOCK = 128  # columns whose corrections to the rest are applied together, as one matrix product
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the mean diagonal; the next one is tried when a factorisation fails
SHRINKS = [1 - step / 40 for step in range(17)]  # 1.0 to 0.6 of a group's extremes


class SingularHessian(ArithmeticError):
    """No damping made the Hessian positive definite: it holds NaN or inf."""


@dataclass(frozen=True)
class _Grid:
    """What columns are rounded to: scale [N, G] (fp16 or fp32) and zero point [N, G] as whole numbers in fp32."""

    scale: torch.Tensor
    zero: torch.Tensor
    levels: int

    def round(self, column: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values of one column [N] of group `group`."""
        scale, zero = self.scale[:, group].float(), self.zero[:, group]
        codes = ((column / scale).round() + zero).clamp(0, self.levels)
        return codes, (codes - zero) * scale


@dataclass(frozen=True)
class Curvature:
    """What GPTQ needs of a Hessian, whatever the bits and groups: the order of the columns, the factor in that order, each column's importance."""

    order: torch.Tensor
    factor: torch.Tensor
    importance: torch.Tensor


def curvature(hessian: torch.Tensor, *, ordered: bool = False) -> Curvature:
    """Factorise `hessian` [K, K] once for many calls of `gptq`. Raises SingularHessian for NaN and inf."""
    columns = len(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(columns, device=hessian.device)
    return Curvature(order, inverse_factor(hessian[order][:, order]), _importance(hessian.diagonal()))


@torch.no_grad()
def gptq(weight: torch.Tensor, hessian: torch.Tensor | Curvature, spec: LinearSpec, *, ordered: bool = False, shrink: bool = False) -> QuantTensor:
    """Quantize `weight` [N, K] for inputs whose second moments are `hessian` [K, K] (any positive multiple of X Xᵀ), or their `curvature`.

    `ordered` rounds the columns with the largest moments first, on ranges fixed beforehand; otherwise columns go left to right and a group's range
    is taken when its turn comes, corrections included. `shrink` lets a range leave out extremes where that lowers the error. Raises
    SingularHessian for NaN and inf in `hessian`.
    """
    work = weight.detach().float().clone()
    width = affine.group_width(spec.in_features, spec.group_size)
    known = hessian if isinstance(hessian, Curvature) else curvature(hessian, ordered=ordered)
    order, factor = known.order, known.factor
    moments = known.importance if shrink else None
    grids = [_grid(work, spec, moments)] if ordered else []
    work = work[:, order]
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    groups = (order // width).tolist()
    for start, stop in _blocks(spec.in_features, spec.in_features if ordered else width):
        if not ordered and start % width == 0:
            grids.append(_grid(work[:, start : start + width], spec, moments if moments is None else moments[start : start + width]))
        errors = torch.empty(len(work), stop - start, device=work.device)
        for position in range(start, stop):
            chosen, value = grids[0].round(work[:, position], groups[position]) if ordered else grids[-1].round(work[:, position], 0)
            codes[:, order[position]] = chosen.to(torch.uint8)
            error = (work[:, position] - value) / factor[position, position]
            work[:, position + 1 : stop] -= error[:, None] * factor[position, position + 1 : stop]
            errors[:, position - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return _pack(codes, grids, spec)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular U, fp32 [K, K], with UᵀU = (H + damping)⁻¹. Columns that calibration never excited get a moment of their own.

    Raises SingularHessian when nothing helps.
    """
    for lower in roots(hessian):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if failed == 0 and torch.isfinite(upper).all():
            return upper.float()
    raise SingularHessian("no damping makes this Hessian positive definite; does it hold NaN or inf?")


def roots(hessian: torch.Tensor) -> Iterator[torch.Tensor]:
    """Lower triangular L, fp64 [K, K], with L Lᵀ = H + damping, for every damping that makes H positive definite, the smallest first."""
    wide = hessian.double()
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    silent = wide.diagonal() <= 0
    for damping in DAMPINGS:
        lower, failed = torch.linalg.cholesky_ex(wide + torch.diag(torch.full_like(wide.diagonal(), float(damping * mean)) + silent * mean))
        if failed == 0 and torch.isfinite(lower).all():
            yield lower


def _importance(diagonal: torch.Tensor) -> torch.Tensor:
    """How much each column's error weighs, fp32 [K]: its moment, damped as in the factor; columns never excited weigh as much as the mean."""
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(diagonal <= 0, mean, diagonal + DAMPINGS[0] * mean).float()


def _blocks(columns: int, width: int) -> list[tuple[int, int]]:
    """Ranges of at most BLOCK columns, none of which lies in two groups."""
    edges = [(start, min(start + width, columns)) for start in range(0, columns, width)]
    return [(start, min(start + BLOCK, last)) for first, last in edges for start in range(first, last, BLOCK)]


def _grid(columns: torch.Tensor, spec: LinearSpec, moments: torch.Tensor | None) -> _Grid:
    """The ranges of whole groups of `columns`; with `moments` [columns], those of least weighted squared error among shrunken ones."""
    width = affine.group_width(spec.in_features, spec.group_size)
    grouped, levels = affine.to_groups(columns, width), 2**spec.weight_bits - 1
    scale, zero = affine.ranges(grouped, spec.weight_bits, spec.weight_symmetric, half_scales=True)
    if moments is None:
        return _Grid(scale, zero, levels)
    importance = affine.to_groups(moments[None], width)
    least = torch.full_like(zero, torch.inf)
    best_scale, best_zero = scale, zero
    for ratio in SHRINKS:
        low, high = (grouped.amin(-1).clamp(max=0) * ratio), (grouped.amax(-1).clamp(min=0) * ratio)
        scale, zero = affine.ranges(torch.stack([low, high], -1), spec.weight_bits, spec.weight_symmetric, half_scales=True)
        wide, offset = scale.float()[..., None], zero[..., None]
        values = (((grouped / wide).round() + offset).clamp(0, levels) - offset) * wide
        error = ((values - grouped).square() * importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return _Grid(best_scale, best_zero, levels)


def _pack(codes: torch.Tensor, grids: list[_Grid], spec: LinearSpec) -> QuantTensor:
    half = all(grid.scale.dtype == torch.float16 for grid in grids)
    scale = torch.cat([grid.scale if half else grid.scale.float() for grid in grids], 1)
    zero = torch.cat([grid.zero for grid in grids], 1).to(torch.uint8)
    return QuantTensor(packing.pack(codes, spec.weight_bits), scale, None if spec.weight_symmetric else packing.pack(zero, spec.weight_bits))
