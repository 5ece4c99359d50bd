"""Maximum mean discrepancies: distances between two sets of features that need no covariance, and so no more samples than features.

    MMD²   mean k(x, x') + mean k(y, y') − 2 mean k(x, y)
    KID    k(x, y) = (x·y / F + 1)³, means over pairs of different samples: unbiased, so that KID may be compared over N and may be below 0
           (Bińkowski et al. 2018, arXiv 1801.01401)
    CMMD   1000 · MMD², k(x, y) = exp(−‖x − y‖² / (2 · 10²)) of CLIP embeddings of length 1; the published numbers count a sample with itself,
           which adds up to 1000 · (1 − mean k) / N (Jayasumana et al. 2024, arXiv 2401.09603)

The customary KID is a mean over 100 random subsets of 1000. All samples at once have the same expectation and less noise; both are here. The
kernel's sums are kept by group, so that the jackknife costs nothing more; at most `BLOCK` kernel values exist at a time. N samples, M reference
samples, F features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dite.errors import UsageError
from dite_evals.features import Features, as_pair, group_slices
from dite_evals.intervals import FEWEST, LEVEL, Estimate, jackknife

BLOCK = 2**22
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
SUBSET_SIZE = 1000
SUBSETS = 100

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SubsetKid:
    """Mean and standard deviation of KID over random subsets. The deviation is one subset's, no error of the mean: the subsets overlap."""

    value: float
    std: float
    n: int
    subsets: int
    subset_size: int


def polynomial(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x·y / F + 1)³ of [N, F] and [M, F] → [N, M]."""
    product = (x @ y.T).div_(x.shape[1]).add_(1)
    return product * product * product


def gaussian(sigma: float, scale: float = 1.0) -> Kernel:
    """`scale` · exp(−‖x − y‖² / (2 σ²)) of [N, F] and [M, F] → [N, M]."""

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squared = torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1)[:, None]).clamp_(min=0)
        return squared.div_(-2 * sigma**2).exp_().mul_(scale)

    return kernel


def mmd2(features: Features, reference: Features, kernel: Kernel = polynomial, unbiased: bool = True) -> float:
    """The bare MMD² of features [N, F] and [M, F], N and M at least 2: unbiased (may be below 0), or with the pairs of a sample and itself."""
    x, y = as_pair(features, reference)
    sums = _Sums.of(x, y, kernel, [slice(0, len(x))])
    return _mmd2(sums.total(), sums.reference, unbiased)


def kid(features: Features, reference: Features, level: float = LEVEL) -> Estimate:
    """Kernel inception distance of features [N, F] from reference features [M, F], N at least 4, from all pairs; jackknife interval.

    O((N + M)² F). For large sets `kid_of_subsets` is the customary cheaper number. Raises UsageError, DiteError (features not finite).
    """
    x, y = as_pair(features, reference)
    return _estimate(x, y, polynomial, unbiased=True).at(level)


def kid_of_subsets(features: Features, reference: Features, subset_size: int = SUBSET_SIZE, subsets: int = SUBSETS, *, seed: int = 0) -> SubsetKid:
    """The customary KID: over random subsets of both sides. The same subsets as torchmetrics' after `torch.manual_seed(seed)` on a CPU."""
    x, y = as_pair(features, reference)
    if not 2 <= subset_size <= min(len(x), len(y)) or subsets < 1:
        raise UsageError(
            "these subsets can't be drawn",
            f"{subsets} subsets of {subset_size} from {len(x)} samples and {len(y)} reference samples; a subset has 2 to {min(len(x), len(y))}",
            f"use subset_size={min(len(x), len(y), SUBSET_SIZE)}",
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        real = y[torch.randperm(len(y), generator=generator)[:subset_size].to(y.device)]
        values.append(mmd2(x[torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)], real))
    found = torch.tensor(values, dtype=torch.float64)
    return SubsetKid(found.mean().item(), found.std(correction=0).item(), len(x), subsets, subset_size)


def cmmd(embeddings: Features, reference: Features, unbiased: bool = False, level: float = LEVEL) -> Estimate:
    """CMMD of CLIP embeddings [N, F] from reference embeddings [M, F], N at least 4; both are scaled to length 1 here. Jackknife interval.

    With `unbiased` a sample is not paired with itself: no longer the published number, but one that N doesn't move. The interval of the
    published number is about that number at this N.
    """
    x, y = as_pair(embeddings, reference)
    return _estimate(_unit(x, "embeddings"), _unit(y, "reference embeddings"), gaussian(CMMD_SIGMA, CMMD_SCALE), unbiased).at(level)


@dataclass(frozen=True)
class _Total:
    """Sums of the kernel of n samples: over all pairs of two, over the pairs of one with itself, and over the pairs with a reference sample."""

    pairs: float
    selves: float
    cross: float
    n: int


@dataclass(frozen=True)
class _Sums:
    """The same by group: `pairs` [G, G], `selves` [G], `cross` [G], `sizes` [G]; and the reference's own."""

    pairs: torch.Tensor
    selves: torch.Tensor
    cross: torch.Tensor
    sizes: torch.Tensor
    reference: _Total

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, groups: list[slice]) -> _Sums:
        parts = [x[group] for group in groups]
        pairs = _pair_sums(x, groups, kernel)
        whole = _Total(_pair_sums(y, group_slices(len(y), -(-len(y) // 1000)), kernel).sum().item(), _self_sum(y, kernel), 0.0, len(y))
        return _Sums(
            pairs,
            torch.tensor([_self_sum(part, kernel) for part in parts], dtype=torch.float64),
            torch.tensor([_sum(part, y, kernel) for part in parts], dtype=torch.float64),
            torch.tensor([len(part) for part in parts]),
            whole,
        )

    def total(self) -> _Total:
        return _Total(self.pairs.sum().item(), self.selves.sum().item(), self.cross.sum().item(), int(self.sizes.sum()))

    def without(self, group: int) -> _Total:
        whole = self.total()
        pairs = whole.pairs - 2 * self.pairs[group].sum().item() + self.pairs[group, group].item()
        selves, cross = whole.selves - self.selves[group].item(), whole.cross - self.cross[group].item()
        return _Total(pairs, selves, cross, whole.n - int(self.sizes[group]))


def _estimate(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, unbiased: bool) -> Estimate:
    if len(x) < FEWEST:
        raise UsageError("too few samples for an interval", f"{len(x)} given, at least {FEWEST} are needed", "raise n")
    groups = group_slices(len(x))
    sums = _Sums.of(x, y, kernel, groups)
    without = [_mmd2(sums.without(index), sums.reference, unbiased) for index in range(len(groups))]
    return jackknife(_mmd2(sums.total(), sums.reference, unbiased), without, len(x))


def _mmd2(samples: _Total, reference: _Total, unbiased: bool) -> float:
    cross = samples.cross / (samples.n * reference.n)
    if unbiased:
        within = sum((one.pairs - one.selves) / (one.n * (one.n - 1)) for one in (samples, reference))
    else:
        within = sum(one.pairs / one.n**2 for one in (samples, reference))
    return within - 2 * cross


def _pair_sums(x: torch.Tensor, groups: list[slice], kernel: Kernel) -> torch.Tensor:
    """[G, G]: the sum of the kernel between every two groups of x, each pair of groups computed once."""
    sums = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for row, group in enumerate(groups):
        rest = x[group.start :]
        columns = sum(kernel(block, rest).sum(0) for block in _blocks(x[group], rest))
        for column in range(row, len(groups)):
            other = groups[column]
            sums[row, column] = sums[column, row] = columns[other.start - group.start : other.stop - group.start].sum().item()
    return sums


def _self_sum(x: torch.Tensor, kernel: Kernel) -> float:
    """Σᵢ k(xᵢ, xᵢ), by small blocks' diagonals."""
    return sum(kernel(block, block).diagonal().sum().item() for block in x.split(64))


def _sum(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> float:
    return sum(kernel(block, y).sum().item() for block in _blocks(x, y))


def _blocks(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of x, so few at a time that their kernel with y has at most `BLOCK` values."""
    return x.split(max(1, BLOCK // len(y)))


def _unit(x: torch.Tensor, name: str) -> torch.Tensor:
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise UsageError(f"the {name} have no direction", f"number {lengths.argmin().item()} is zero throughout", "check the extractor")
    return x / lengths
