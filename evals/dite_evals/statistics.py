"""Reference statistics: the moments of a data set's features, so that nobody needs the data to compute an FID.

A safetensors file with `mu` fp64 [F] and `sigma` fp64 [F, F] (unbiased), and as metadata the number of images, the extractor's id, and the
name and hash of the data. Comparing features of two different extractors is an error, never a number.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dite.errors import CheckpointError, UsageError
from dite_evals.extractors import Extractor
from dite_evals.frechet import Moments, moments, threads_for

FORMAT = "dite-statistics-1"


@dataclass(frozen=True)
class Statistics:
    """Moments of a data set under one extractor."""

    moments: Moments
    extractor_id: str
    data_name: str
    data_sha256: str

    def require(self, extractor: Extractor) -> None:
        """Raise UsageError unless these statistics were computed with `extractor`."""
        if self.extractor_id != extractor.id:
            raise UsageError(
                "these reference statistics belong to another extractor",
                f"they were computed with {self.extractor_id}, the images with {extractor.id}",
                "compute the statistics again with this extractor, or use the extractor of the protocol",
            )


def compute_statistics(extractor: Extractor, images: torch.Tensor, data_name: str, device: torch.device | str = "cpu") -> Statistics:
    """Statistics of `images` uint8 [N, 3, H, W], N at least 2."""
    return Statistics(moments(extractor.extract(images, device)), extractor.id, data_name, images_sha256(images))


def images_sha256(images: torch.Tensor) -> str:
    """Hash of the pixels and the shape."""
    digest = hashlib.sha256(str(list(images.shape)).encode())
    digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write atomically: a temporary file beside it, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": FORMAT,
        "n": str(statistics.moments.n),
        "extractor": statistics.extractor_id,
        "data": statistics.data_name,
        "data_sha256": statistics.data_sha256,
    }
    partial = path.with_name(path.name + ".partial")
    save_file({"mu": statistics.moments.mu.contiguous(), "sigma": statistics.moments.sigma.contiguous()}, partial, metadata)
    os.replace(partial, path)


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read and check. Raises CheckpointError for a file that isn't one, or whose numbers are no mean and covariance."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            keys = set(file.keys())
            _check(metadata.get("format") == FORMAT, path, f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
            _check(keys == {"mu", "sigma"}, path, f"it holds {sorted(keys)}, expected mu and sigma")
            mu, sigma = file.get_tensor("mu"), file.get_tensor("sigma")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read statistics {path}", str(error), "give a file written by dite") from error
    text = metadata.get("n", "")
    _check(text.isascii() and text.isdigit() and len(text) < 16 and int(text) >= 2, path, f"n is {text!r}, expected a number of at least 2")
    missing = [key for key in ("extractor", "data", "data_sha256") if not metadata.get(key)]
    _check(not missing, path, f"metadata {', '.join(missing)} is missing")
    _check_moments(mu, sigma, path)
    return Statistics(Moments(mu, sigma, int(text)), metadata["extractor"], metadata["data"], metadata["data_sha256"])


def inject_(metric: Any, reference: Moments) -> None:
    """Give a torchmetrics FrechetInceptionDistance its real side, in place and exactly.

    torchmetrics keeps sums: Σx = n·μ and Σxxᵀ = (n − 1)·Σ + n·μμᵀ.
    """
    metric.real_features_sum = reference.mu * reference.n
    metric.real_features_cov_sum = reference.sigma * (reference.n - 1) + reference.n * torch.outer(reference.mu, reference.mu)
    metric.real_features_num_samples = torch.tensor(reference.n)


def _check_moments(mu: torch.Tensor, sigma: torch.Tensor, path: Any) -> None:
    _check(mu.dtype == sigma.dtype == torch.float64, path, f"mu is {mu.dtype} and sigma {sigma.dtype}, expected float64")
    _check(mu.dim() == 1 and sigma.shape == (len(mu), len(mu)) and len(mu) > 0, path, f"mu is {list(mu.shape)} and sigma {list(sigma.shape)}")
    _check(bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()), path, "a number in it is not finite")
    scale = sigma.diagonal().abs().max().item()
    _check((sigma - sigma.T).abs().max().item() <= 1e-9 * scale, path, "sigma is not symmetric")
    with threads_for(len(mu)):
        lowest = torch.linalg.eigvalsh(sigma).min().item()
    _check(lowest >= -1e-6 * scale, path, f"sigma is no covariance: its smallest eigenvalue is {lowest:.3g}")


def _check(holds: bool, path: Any, why: str) -> None:
    if not holds:
        raise CheckpointError(f"{path} holds no usable statistics", why, "write it again with dite_evals.statistics.write_statistics")
