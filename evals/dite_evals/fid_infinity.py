"""FID∞ with an interval: the line through FID against 1/N, drawn anew without each group of samples.

    FID_k  mean over k disjoint blocks of ⌊N/k⌋ samples, k = 1..5;   FID∞  where the line through (mean 1/size, FID_k) meets 1/N = 0

A group lies in one block of each k, or in two, so that leaving it out changes little: about 5 G + 18 distances in all, where drawing every line
from the start would take 15 G. N samples, F features, G groups.
"""

from __future__ import annotations

import torch

from dite.errors import UsageError
from dite_evals.features import Features, check_rank, group_slices
from dite_evals.fid import SIZES, both_sides, extrapolate
from dite_evals.frechet import Moments, Reference, Sums
from dite_evals.intervals import LEVEL, Estimate, jackknife

FEWEST = 40  # so that the smallest block keeps 5 samples without a group

Point = tuple[float, float]


def estimate_fid_infinity(features: Features, reference: Moments | Reference, *, force: bool = False, level: float = LEVEL) -> Estimate:
    """FID∞ of features [N, F], N at least 40; the line's value with a jackknife interval.

    Unless `force`, every block must have more samples than features: N ≥ 5 (F + 1). Below that FID bends, and the line misses.
    """
    x, against = both_sides(features, reference)
    size, num_features = len(x) // SIZES, x.shape[1]
    if len(x) < FEWEST:
        raise UsageError(f"{len(x)} samples are too few for an interval around FID∞", f"at least {FEWEST} are needed", "raise n")
    if size <= num_features and not force:
        raise UsageError(
            f"{len(x)} samples are too few for FID∞ of {num_features} features",
            f"its smallest blocks have {size} samples; the rule is more than {num_features} in each, below which FID isn't a line in 1/N",
            f"use {SIZES * (num_features + 1)} or more, the corrected FID of all samples, or force it",
        )
    check_rank(against.moments.n, num_features, force, "reference samples")
    groups = group_slices(len(x))
    lines = [_points(x, against, count, groups) for count in range(1, SIZES + 1)]
    drawn = [extrapolate(curve) for curve in zip(*lines, strict=True)]
    return jackknife(drawn[0], drawn[1:], len(x), level)


def _points(x: torch.Tensor, reference: Reference, count: int, groups: list[slice]) -> list[Point]:
    """(size, mean FID) of `count` blocks: of all samples, then without each group. Sizes that differ are averaged as 1/N."""
    size, origin = len(x) // count, reference.moments.mu
    blocks = [slice(index * size, (index + 1) * size) for index in range(count)]
    sums = [Sums.of(x[block], origin) for block in blocks]
    whole = [(float(size), reference.distance(one.moments(origin))) for one in sums]
    points = [_mean(whole)]
    for group in groups:
        changed = list(whole)
        for index, block in enumerate(blocks):
            shared = x[max(group.start, block.start) : min(group.stop, block.stop)]
            if len(shared):
                left = sums[index] - Sums.of(shared, origin)
                changed[index] = (float(left.n), reference.distance(left.moments(origin)))
        points.append(_mean(changed))
    return points


def _mean(blocks: list[Point]) -> Point:
    return len(blocks) / sum(1 / size for size, _ in blocks), sum(value for _, value in blocks) / len(blocks)
