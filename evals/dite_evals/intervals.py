"""Intervals of a metric, and of the difference between two models, from the metric of parts of the samples.

    θ        the metric of all N samples
    θ_r      the metric of a share f of them: all but one of G groups (jackknife), or drawn without replacement (subsampling)
    error²   f / (1 − f) · mean_r (θ_r − mean θ_r)²
    bias     f / (1 − f) · (mean θ_r − θ)             where the bias falls like 1/N, as FID's does

With f = (G−1)/G this is the delete-a-group jackknife (Quenouille 1956, Tukey 1958; Efron and Stein 1981: on average not too small); with a free f
the subsampling of Politis and Romano 1994, which also serves metrics that aren't smooth. The naive bootstrap is no alternative: it repeats
samples, and FID, KID and nearest neighbours all see repeated samples.

An interval is about other samples of the same model against the same reference: the reference is taken as it is. What N does to the metric itself
is not in it; `Estimate.corrected` takes the part that falls like 1/N away. How often each interval holds the truth is measured by
`evals/interval_coverage.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from dite.errors import UsageError
from dite_evals.features import GROUPS, Features, as_features, group_slices

LEVEL = 0.95
DRAWS = 100
FEWEST = 4
AGREEMENT = 1e-12  # shares that differ by less differ by rounding
ANY = (-math.inf, math.inf)

Statistic = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class Replicates:
    """The metric of parts of the samples: each `fraction` of them; `degrees` of freedom of their scatter; `parts` names them."""

    values: tuple[float, ...]
    fraction: float
    degrees: int
    parts: str

    @property
    def inflation(self) -> float:
        """f / (1 − f)."""
        return self.fraction / (1 - self.fraction)


@dataclass(frozen=True)
class Estimate:
    """A metric's `value` of `n` samples and its `interval` at confidence `level`, kept within `bounds`.

    Of a `share` the interval is Wilson's for n cases where the replicates all agree, as they do where the share is 0 or 1: certain it is not.
    """

    value: float
    n: int
    interval: tuple[float, float]
    level: float
    replicates: Replicates
    bounds: tuple[float, float] = ANY
    share: bool = False

    @property
    def error(self) -> float:
        """Standard error."""
        values = torch.tensor(self.replicates.values, dtype=torch.float64)
        return math.sqrt(self.replicates.inflation * (values - values.mean()).square().mean().item())

    @property
    def bias(self) -> float:
        """By how much the value is too large because N is finite, to first order in 1/N; noisy where the bias is small."""
        mean = math.fsum(self.replicates.values) / len(self.replicates.values)
        return self.replicates.inflation * (mean - self.value)

    def corrected(self) -> Estimate:
        """The value less its bias, for N → ∞, with an interval as wide as before around that; both may leave the bounds."""
        value = self.value - self.bias
        shift = value - math.fsum(self.replicates.values) / len(self.replicates.values)
        values = tuple(one + shift for one in self.replicates.values)
        moved = replace(self, value=value, bounds=ANY, replicates=replace(self.replicates, values=values))
        return replace(moved, interval=_around(moved))

    def at(self, level: float) -> Estimate:
        """The same with an interval at another confidence level."""
        moved = replace(self, level=level)
        return replace(moved, interval=_around(moved))


def jackknife(value: float, without: Sequence[float] | torch.Tensor, n: int, level: float = LEVEL, bounds: tuple[float, float] = ANY) -> Estimate:
    """The estimate whose replicates are the metric without each of G ≥ 2 groups of about equal size, in order of the groups."""
    values = tuple(float(one) for one in without)
    count = len(values)
    if count < 2:
        raise UsageError("too few samples for an interval", f"{n} samples make {count} group, a jackknife leaves out each of at least 2", "raise n")
    blank = Estimate(value, n, (value, value), level, Replicates(values, (count - 1) / count, count - 1, f"all but one of {count} groups"), bounds)
    return replace(blank, interval=_around(blank))


def jackknife_of(statistic: Statistic, features: Features, groups: int = GROUPS, level: float = LEVEL) -> Estimate:
    """Jackknife of any function of features [N, F]: computed anew without each group. The metrics of this package do it with less work."""
    x = as_features(features, at_least=FEWEST)
    without = [statistic(torch.cat([x[: part.start], x[part.stop :]])) for part in group_slices(len(x), groups)]
    return jackknife(statistic(x), without, len(x), level)


def subsample(statistic: Statistic, features: Features, fraction: float = 0.5, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Subsampling of any function of features [N, F]: `draws` parts drawn without replacement, the same ones for every array of N rows.

    A part holds ⌊`fraction` · N⌋ samples, at least 2. The metric's own bias may differ between a part and the whole; only the scatter is used. The
    interval is of 95%; `Estimate.at` gives another.
    """
    x = as_features(features, at_least=FEWEST)
    size = int(fraction * len(x)) if 0 < fraction < 1 else 0
    if not 2 <= size < len(x) or draws < 2:
        raise UsageError(
            "these parts can't be drawn",
            f"{draws} draws of fraction {fraction} of {len(x)} samples: at least 2 draws, of 2 to {len(x) - 1} samples each",
            "use fraction=0.5, draws=100",
        )
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randperm(len(x), generator=generator)[:size].to(x.device) for _ in range(draws))
    values = tuple(float(statistic(x[part])) for part in parts)
    value = float(statistic(x))
    blank = Estimate(value, len(x), (value, value), LEVEL, Replicates(values, size / len(x), draws - 1, f"{draws} parts of {size}, seed {seed}"))
    return replace(blank, interval=_around(blank))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """`first` − `second`, paired: sample i of both comes from the same seed, so that what both gain from an easy seed cancels out.

    The interval excludes 0 where the two models differ at that level. Both must be of the same N, level and parts; raises UsageError otherwise.
    """
    one, other = first.replicates, second.replicates
    if (first.n, first.level, one.fraction, one.parts) != (second.n, second.level, other.fraction, other.parts):
        raise UsageError(
            "these estimates don't pair up",
            f"N {first.n} at {first.level:g} by {one.parts}, against N {second.n} at {second.level:g} by {other.parts}",
            "compute both from the samples of the same seeds, with the same settings",
        )
    values = tuple(a - b for a, b in zip(one.values, other.values, strict=True))
    value = first.value - second.value
    blank = Estimate(value, first.n, (value, value), first.level, replace(one, values=values))
    return replace(blank, interval=_around(blank))


def student(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = `level` for Student's T of whole `degrees` of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4, solved by halving).

    >>> [round(student(0.9, d), 3) for d in (1, 2, 3, 19)], round(student(0.95, 10**4), 3)
    ([6.314, 2.92, 2.353, 1.729], 1.96)
    """
    if not 0 < level < 1 or degrees < 1:
        raise UsageError("there is no such interval", f"level {level:g} of {degrees} degrees; a level lies between 0 and 1", "use 0.9 or 0.95")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def wilson(share: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a proportion `share` of n independent cases (Wilson 1927): has a width also where the share is 0 or 1.

    >>> [round(x, 4) for x in wilson(1.0, 100)]
    [0.963, 1.0]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _around(estimate: Estimate) -> tuple[float, float]:
    half = student(estimate.level, estimate.replicates.degrees) * estimate.error
    if estimate.share and half < AGREEMENT:
        return wilson(estimate.value, estimate.n, estimate.level)
    least, most = estimate.bounds
    return min(most, max(least, estimate.value - half)), max(least, min(most, estimate.value + half))


def _within(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees · tan angle)."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for index in range(3 if odd else 2, degrees - 1, 2):
        term *= square * (index - 1) / index
        total += term
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
