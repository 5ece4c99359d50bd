"""Fréchet inception distance of N samples, with what it needs to be believed: an interval, and its limit for N → ∞.

FID is biased: it falls like FID∞ + c / N, with a c that depends on the model (Chong and Forsyth 2020, arXiv 1911.07023).

    FID∞      line through FID against k/N for k = 1..5: the samples are cut into k blocks, FID_k is the mean over the k blocks
    interval  delete-a-group jackknife: FID ± t · √((G−1)/G · Σ (FID₋g − mean)²), G groups; 95%

`Estimate.corrected` is another FID∞, from the jackknife; `fid_infinity.py` puts an interval around the line's. Blocks are contiguous, so that
classes assigned in turn stay balanced inside each. The naive bootstrap is no alternative: repeated samples shrink the covariance, and its interval
need not even contain the estimate. N samples, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dite.errors import DiteError, UsageError
from dite_evals.backend import torchmetrics
from dite_evals.extractors import Extractor
from dite_evals.features import Features, as_features, check_rank, group_slices
from dite_evals.frechet import Moments, Reference, Sums, frechet_distance, moments, threads_for
from dite_evals.intervals import LEVEL, Estimate, jackknife
from dite_evals.statistics import Statistics, inject_

MIN_SAMPLES = 10
SIZES = 5
AGREEMENT = 1e-3
ROUNDING = 1e-5


def fid_between(extractor: Extractor, first: torch.Tensor, second: torch.Tensor, device: torch.device | str = "cpu") -> float:
    """FID between two sets of images, uint8 [N, 3, H, W] and [M, 3, H, W]; N and M at least 2.

    For the floor under a latent model's FID: the images against their own reconstructions.
    """
    return frechet_distance(moments(extractor.extract(first, device)), moments(extractor.extract(second, device)))


def fid_of_images(extractor: Extractor, images: torch.Tensor, statistics: Statistics, device: torch.device | str = "cpu") -> float:
    """FID of images, uint8 [N, 3, H, W] with N at least 2, against reference statistics; the bare number."""
    statistics.require(extractor)
    return frechet_distance(statistics.moments, moments(extractor.extract(images, device)))


def estimate_fid(features: Features, reference: Moments | Reference, *, force: bool = False, level: float = LEVEL) -> Estimate:
    """FID of features [N, F] against reference moments, with its interval; `corrected` is the FID of infinitely many samples.

    Needs more samples than features, on both sides, unless `force`; N at least 10.
    """
    x, against = both_sides(features, reference)
    check_count(len(x))
    check_rank(len(x), x.shape[1], force)
    check_rank(against.moments.n, x.shape[1], force, "reference samples")
    return jackknife(against.distance(moments(x)), distances_without(x, against), len(x), level, bounds=(0.0, math.inf))


def both_sides(features: Features, reference: Moments | Reference) -> tuple[torch.Tensor, Reference]:
    """fp64 [N, F] and a reference of the same F on one device. Raises UsageError for two widths or no feature vectors, DiteError for NaN."""
    x = as_features(features)
    num_features = len(reference.mu if isinstance(reference, Moments) else reference.moments.mu)
    if x.shape[1] != num_features:
        raise UsageError("features don't match", f"{x.shape[1]} features against {num_features}", "use one extractor for both sides")
    against = Reference(reference) if isinstance(reference, Moments) else reference
    return x.to(against.moments.mu.device), against


def check_count(n: int) -> None:
    """Raise UsageError when `n` samples are too few for an FID with interval and limit."""
    if n < MIN_SAMPLES:
        raise UsageError(
            f"{n} samples are too few for an FID",
            f"the fit against 1/N needs at least {MIN_SAMPLES}",
            f"use --n {MIN_SAMPLES} or more; 5000 is customary",
        )


def agree_with_torchmetrics(value: float, features: torch.Tensor, reference: Moments) -> None:
    """Raise DiteError when torchmetrics finds another FID of the same features [N, F] than `value`: by more than 0.1%, and than its rounding (the
    roots of an unsymmetric product: 1e-5 of the reference's variance)."""
    other = torchmetrics_fid(features, reference)
    if not math.isclose(value, other, rel_tol=AGREEMENT, abs_tol=ROUNDING * reference.sigma.trace().item()):
        raise DiteError(
            "two computations of one FID disagree", f"ours is {value:.6g}, torchmetrics' {other:.6g}", "report this: one of them is wrong"
        )


def torchmetrics_fid(features: torch.Tensor, reference: Moments) -> float:
    """The same distance by torchmetrics, fed with features instead of images."""
    metric = torchmetrics("image.fid").FrechetInceptionDistance(feature=_AsIs(features.shape[1]))
    inject_(metric, reference)
    for batch in features.double().split(1000):
        metric.update(batch, real=False)
    with threads_for(features.shape[1]):
        return metric.compute().item()


def distances_without(features: torch.Tensor, reference: Reference) -> torch.Tensor:
    """FID of features [N, F] without each of up to 20 groups in turn, fp64 [G]."""
    parts = [Sums.of(features[group].double(), reference.moments.mu) for group in group_slices(len(features))]
    total = sum(parts[1:], parts[0])
    return torch.tensor([reference.distance((total - part).moments(reference.moments.mu)) for part in parts], dtype=torch.float64)


def size_curve(features: torch.Tensor, reference: Reference) -> list[tuple[int, float]]:
    """(N // k, mean FID of k disjoint blocks of that size) for k = 1..5."""
    curve = []
    for count in range(1, SIZES + 1):
        size = len(features) // count
        values = [reference.distance(moments(features[block * size : (block + 1) * size])) for block in range(count)]
        curve.append((size, sum(values) / count))
    return curve


def extrapolate(curve: Sequence[tuple[float, float]]) -> float:
    """Intercept at 1/N = 0 of the least-squares line through (1/N, FID). May be negative for few samples."""
    x = torch.tensor([1 / size for size, _ in curve], dtype=torch.float64)
    y = torch.tensor([value for _, value in curve], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() - slope * x.mean()).item()


class _AsIs(nn.Module):
    """Stands in for torchmetrics' network where features are already known."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features
