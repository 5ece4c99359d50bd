"""Feature arrays as every metric takes them: checked once, turned to fp64, cut into groups.

    features   [N, F]   of the samples under test, in order of their index: sample i of two models has the same seed
    reference  [M, F]   of real images, or of another model

Tensors stay on their device; numpy arrays and nested lists become tensors on the CPU. N samples, M reference samples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dite.errors import DiteError, UsageError

GROUPS = 20

Features = torch.Tensor | np.ndarray | Sequence[Sequence[float]]


def as_features(values: Features, name: str = "features", at_least: int = 2) -> torch.Tensor:
    """`values` as fp64 [N, F] with N ≥ `at_least` and F ≥ 1. `name` is what an error calls them.

    Raises UsageError for another shape or no numbers at all, DiteError for NaN or infinity.

    >>> as_features([[1, 2], [3, 4]]).shape
    torch.Size([2, 2])
    """
    x = _tensor(values, name)
    if x.dim() != 2 or x.shape[1] == 0:
        raise UsageError(f"the {name} are no feature vectors", f"their shape is {list(x.shape)}, expected [N, F]", "give one row a sample")
    if len(x) < at_least:
        raise UsageError(f"too few {name}", f"{len(x)} given, at least {at_least} are needed", "raise n")
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise DiteError(
            f"the {name} are not finite",
            f"{len(bad)} of {len(x)} hold NaN or infinity, the first is number {bad[0].item()}",
            "look at that sample's image, and check the extractor's weights",
        )
    return x


def as_pair(features: Features, reference: Features, at_least: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides of a distance, fp64 [N, F] and [M, F] on one device. Raises what `as_features` does, and UsageError for two widths."""
    x, y = as_features(features, "features", at_least), as_features(reference, "reference features", at_least)
    if x.shape[1] != y.shape[1]:
        raise UsageError("features don't match", f"{x.shape[1]} features against {y.shape[1]}", "use one extractor for both sides")
    return x, y.to(x.device)


def check_rank(n: int, num_features: int, force: bool = False, name: str = "samples") -> None:
    """Raise UsageError when a Fréchet distance of F features is asked of n ≤ F vectors, unless `force`.

    Such a covariance is singular: it says that the features never leave n − 1 dimensions, and the distance measures mostly how many samples
    there were. Of two models the better can then have the larger FID.
    """
    if n <= num_features and not force:
        raise UsageError(
            f"{n} {name} are too few for a Fréchet distance of {num_features} features",
            f"they span at most {n - 1} of {num_features} dimensions, so that the distance measures how many they are; "
            f"the rule is more {name} than features",
            f"use {num_features + 1} or more (5000 is customary), a metric without covariances (KID), or force it",
        )


def group_slices(n: int, groups: int = GROUPS) -> list[slice]:
    """Contiguous groups of n samples, sizes differing by at most 1: as many as `groups`, fewer where a group would have less than 2.

    Contiguous, so that classes assigned in turn stay balanced inside each.

    >>> [(one.start, one.stop) for one in group_slices(7, 3)]
    [(0, 3), (3, 5), (5, 7)]
    """
    count = max(1, min(groups, n // 2))
    edges = [index * (n // count) + min(index, n % count) for index in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]


def _tensor(values: Any, name: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor) and not values.is_complex():
        return values.detach().double()
    try:
        array = np.array(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"their type is {array.dtype}")
        return torch.from_numpy(array.astype(np.float64))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the {name} are no feature vectors", str(error), "give an array of numbers [N, F]") from error
