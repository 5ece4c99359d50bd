"""Reference statistics of others: the `.npz` of ADM's evaluator and of clean-fid, read and written.

Both hold `mu` and `sigma`; ADM's also `mu_s` and `sigma_s`, the moments of the spatial features. Neither says of how many images they are, nor
what made them, so that who imports one has to say both. ADM's `arr_0`, images for precision and recall, is an `image_sources.NpzSource`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from dite.errors import UsageError
from dite_evals import npz
from dite_evals.extractors import Extractor
from dite_evals.frechet import Moments
from dite_evals.statistics import Statistics, check, check_moments

ASYMMETRY = 1e-5  # of the largest variance: what a file may have lost to single precision
HINT = "is this the whole file, and one of statistics?"


def holds_statistics(path: Path) -> bool:
    """Whether an `.npz` has moments in it (and not just images)."""
    return npz.read_headers(path).keys() >= {"mu", "sigma"}


def read_npz(path: str | os.PathLike[str], extractor_id: str, n: int | None) -> Statistics:
    """Import the statistics of `n` images from ADM's or clean-fid's `.npz`, for the extractor that made them.

    Raises UsageError without `n`, or when the file holds no moments; CheckpointError when they are no mean and covariance.
    """
    path = Path(path)
    keys = npz.read_headers(path).keys()
    if not keys >= {"mu", "sigma"}:
        held = ", ".join(keys) or "nothing"
        raise UsageError(f"{path} holds no statistics", f"it holds {held}, expected mu and sigma", "an .npz of images needs no import")
    if n is None or n < 2:
        why = "the file doesn't say of how many images its moments are" if n is None else f"{n} images have no covariance, at least 2 are needed"
        raise UsageError(f"{path} needs a count", why, "--n N; 50000 for the usual sets")
    spatial = _imported(path, "mu_s", "sigma_s", n) if keys >= {"mu_s", "sigma_s"} else None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Statistics(_imported(path, "mu", "sigma", n), extractor_id, path.name, digest, spatial)


def write_npz(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write ADM's layout, which clean-fid and pytorch-fid read too: `mu, sigma`, and `mu_s, sigma_s` where there are spatial moments."""
    arrays = {"mu": statistics.moments.mu.numpy(), "sigma": statistics.moments.sigma.numpy()}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mu.numpy(), "sigma_s": statistics.spatial.sigma.numpy()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    npz.write_npz(Path(path), arrays)


def require_width(statistics: Statistics, extractor: Extractor) -> None:
    """Raise UsageError unless imported moments have as many features as the extractor gives."""
    if len(statistics.moments.mu) != extractor.num_features:
        raise UsageError(
            "these statistics were made with another extractor",
            f"they have {len(statistics.moments.mu)} features, {extractor.name} gives {extractor.num_features}",
            "Inception's have 2048",
        )
    if statistics.spatial is not None and len(statistics.spatial.mu) != extractor.num_spatial:
        why = f"they have {len(statistics.spatial.mu)} spatial features, {extractor.name} gives {extractor.num_spatial or 'none'}"
        raise UsageError("these statistics were made with another extractor", why, "ADM's have 2023")


def _imported(path: Path, mu_name: str, sigma_name: str, n: int) -> Moments:
    """fp64 moments; sigma is made exactly symmetric if it is so but for rounding."""
    arrays = [npz.read_array(path, name) for name in (mu_name, sigma_name)]
    for name, array in zip((mu_name, sigma_name), arrays, strict=True):
        check(array.dtype in (np.float32, np.float64), path, f"{name} is {array.dtype}, expected float64", HINT)
    mu, sigma = (torch.from_numpy(np.array(array, np.float64, order="C")) for array in arrays)
    check(mu.dim() == 1 and sigma.shape == (len(mu), len(mu)) and len(mu) > 0, path, f"mu is {list(mu.shape)} and sigma {list(sigma.shape)}", HINT)
    check(bool(torch.isfinite(sigma).all()), path, "a number in it is not finite", HINT)
    asymmetry, scale = (sigma - sigma.T).abs().max().item(), sigma.diagonal().abs().max().item()
    check(asymmetry <= ASYMMETRY * scale, path, f"{sigma_name} is not symmetric", HINT)
    check_moments(mu, (sigma + sigma.T) / 2, path, HINT)
    return Moments(mu, (sigma + sigma.T) / 2, n)
