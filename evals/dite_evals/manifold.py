"""Precision and recall of samples against reference features, by k nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    manifold   of a set: the union of balls around its vectors, each as wide as the distance to the k-th nearest other vector
    precision  share of samples inside the reference's manifold          falls when images look wrong
    recall     share of reference vectors inside the samples' manifold   falls when kinds of images are missing

Both depend on N and M, the more so the fewer there are: compare them at equal sizes only (the paper has 50,000 each, ADM 10,000 against 50,000).
Distances are taken block by block: 10,000 × 10,000 would be 800 MB. A tie counts as inside; fp64 throughout, where ADM's evaluator has fp16.
N samples, M reference samples, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dite.errors import UsageError
from dite_evals.features import Features, as_pair, group_slices
from dite_evals.intervals import LEVEL, Estimate, jackknife

K = 3
BLOCK = 2**22
ROUNDING = 1e-12  # of ‖x‖² + ‖y‖²: ‖x‖² + ‖y‖² − 2x·y doesn't find copies at distance 0, but closer than this


@dataclass(frozen=True)
class PrecisionRecall:
    """Both with intervals of the sampling; `k` neighbours, `reference_n` reference vectors."""

    precision: Estimate
    recall: Estimate
    k: int
    reference_n: int


def precision_recall(features: Features, reference: Features, k: int = K, level: float = LEVEL) -> PrecisionRecall:
    """Precision and recall of features [N, F] against reference features [M, F].

    The jackknife leaves out groups of samples, and a ball that lost a neighbour grows. Where no group makes a difference (a share of 0 or 1, mostly)
    the interval is Wilson's, which has a width also there; a `difference` of two such shares has none.

    Raises UsageError for too few vectors (every ball needs k neighbours in any N − N/G) and two widths, DiteError for NaN.
    """
    x, y = as_pair(features, reference)
    groups = group_slices(len(x))
    left = len(x) - (groups[0].stop - groups[0].start)
    if k < 1 or left <= k or len(y) <= k or len(groups) < 2:
        raise UsageError(
            f"there are no {k} nearest neighbours",
            f"{len(x)} samples, of which {left} are left without a group of them, and {len(y)} reference samples; more than k, and k ≥ 1, are needed",
            f"raise n, or use k={K}",
        )
    centre = y.mean(0)
    x, y = x - centre, y - centre
    inside, covered = _membership(x, y, _radii_without(x, k, groups), _radii(y, k))
    total = inside.sum().item()
    precisions = [(total - inside[group].sum().item()) / (len(x) - (group.stop - group.start)) for group in groups]
    recalls = covered.double().mean(0).tolist()
    return PrecisionRecall(_share(total / len(x), precisions, len(x), level), _share(recalls[0], recalls[1:], len(x), level), k, len(y))


def _share(value: float, without: list[float], n: int, level: float) -> Estimate:
    return replace(jackknife(value, without, n, level, bounds=(0.0, 1.0)), share=True).at(level)


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance to the k-th nearest other vector, [N]."""
    return torch.cat([_smallest(block, k)[:, -1] for _, block in _to_others(x)])


def _radii_without(x: torch.Tensor, k: int, groups: list[slice]) -> torch.Tensor:
    """[N, 1 + G]: the same; then without each group, and −1 for its own members, whose balls are gone."""
    radii = x.new_empty(len(x), 1 + len(groups))
    for rows, block in _to_others(x):
        kept = [min(k, group.stop - group.start) for group in groups]
        nearest = torch.cat([_smallest(block[:, group], count) for group, count in zip(groups, kept, strict=True)], 1)
        radii[rows, 0] = _smallest(nearest, k)[:, -1]
        for index, columns in enumerate(torch.arange(nearest.shape[1], device=x.device).split(kept)):
            radii[rows, 1 + index] = _smallest(nearest.index_fill(1, columns, torch.inf), k)[:, -1]
    for index, group in enumerate(groups):
        radii[group, 1 + index] = -1.0
    return radii


def _membership(x: torch.Tensor, y: torch.Tensor, radii_x: torch.Tensor, radii_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples lie inside the reference's manifold, [N]; which reference vectors inside the samples' and those without a group, [M, 1 + G]."""
    inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    covered = torch.zeros(len(y), radii_x.shape[1], dtype=torch.bool, device=x.device)
    widest, norms = radii_x.max(1).values, x.square().sum(1)
    for rows, block in _distances(y, x):
        block -= ROUNDING * (y[rows].square().sum(1)[:, None] + norms)
        inside |= (block <= radii_y[rows, None]).any(0)
        near, ball = (block <= widest).nonzero(as_tuple=True)  # few: a ball holds about k reference vectors
        distance, part = block[near, ball], covered[rows]
        for column in range(radii_x.shape[1]):
            wide = radii_x[ball, column]
            part[near[(distance <= wide) & (wide >= 0)], column] = True
    return inside, covered


def _smallest(block: torch.Tensor, k: int) -> torch.Tensor:
    """The k smallest numbers of each row, in order; `topk`, as `kthvalue` takes 20 times as long on a CPU."""
    return block.topk(k, dim=1, largest=False).values


def _to_others(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of squared distances within one set; infinite between a vector and itself."""
    for rows, block in _distances(x, x):
        own = torch.arange(rows.start, rows.stop, device=x.device)
        block[own - rows.start, own] = torch.inf
        yield rows, block


def _distances(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks [b, M] of squared distances between the rows of x and all of y, at most `BLOCK` numbers each."""
    rows = max(1, BLOCK // len(y))
    norms = y.square().sum(1)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        squared = torch.addmm(norms, part, y.T, alpha=-2).add_(part.square().sum(1)[:, None]).clamp_(min=0)
        yield slice(start, start + len(part)), squared
