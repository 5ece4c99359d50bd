"""Reference statistics: the moments of a data set's features, so that nobody needs the data to compute an FID.

A safetensors file with `mu` fp64 [F] and `sigma` fp64 [F, F] (unbiased), and as metadata the number of images, the extractor's id, and the
name and hash of the data. Comparing features of two different extractors is an error, never a number. Two things may be added:

    mu_spatial, sigma_spatial    the same of the extractor's spatial features, for sFID
    features                     fp32 [K, F] of K images, for what needs more than moments: KID, precision and recall

`statistics_npz` reads and writes those of ADM and clean-fid.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dite.errors import CheckpointError, UsageError
from dite.outputs import write_file
from dite_evals.extractors import Extractor
from dite_evals.frechet import Moments, Sums, threads_for

FORMAT = "dite-statistics-1"
SPATIAL = {"mu_spatial", "sigma_spatial"}
HINT = "write it again with dite_evals.statistics.write_statistics"


@dataclass(frozen=True)
class Statistics:
    """Moments of a data set under one extractor; `spatial` and `features` where they were kept."""

    moments: Moments
    extractor_id: str
    data_name: str
    data_sha256: str
    spatial: Moments | None = None
    features: torch.Tensor | None = None

    def require(self, extractor: Extractor) -> None:
        """Raise UsageError unless these statistics were computed with `extractor`."""
        if self.extractor_id != extractor.id:
            raise UsageError(
                "these reference statistics belong to another extractor",
                f"they were computed with {self.extractor_id}, the images with {extractor.id}",
                "compute the statistics again with this extractor, or use the extractor of the protocol",
            )

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of the numbers that FID is measured against, and of those that KID, precision and recall are."""
        moments = [self.moments, *([self.spatial] if self.spatial else [])]
        parts = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for one in moments for part in (one.mu, one.sigma)))
        features = None if self.features is None else hashlib.sha256(self.features.contiguous().numpy().tobytes()).hexdigest()
        return {"reference_moments_sha256": parts.hexdigest(), "reference_features_sha256": features}

    def facts(self) -> dict[str, Any]:
        """What they are of, without the numbers themselves."""
        return {
            "n": self.moments.n,
            "extractor": self.extractor_id,
            "data": self.data_name,
            "data_sha256": self.data_sha256,
            "num_features": len(self.moments.mu),
            "num_spatial": 0 if self.spatial is None else len(self.spatial.mu),
            "kept_features": 0 if self.features is None else len(self.features),
        }


@dataclass(frozen=True)
class ImageSet:
    """`n` images under a `name`, in batches uint8 [B, 3, H, W] of an extractor's `batch_size`, the last one smaller."""

    name: str
    n: int
    batches: Iterable[torch.Tensor]


def compute_statistics(extractor: Extractor, images: torch.Tensor, data_name: str, device: torch.device | str = "cpu", keep: int = 0) -> Statistics:
    """Statistics of `images` uint8 [N, 3, H, W], N at least 2. The features of `keep` of them, evenly spaced, are kept."""
    return gather_statistics(extractor, ImageSet(data_name, len(images), images.split(extractor.batch_size)), device, keep)


def gather_statistics(extractor: Extractor, images: ImageSet, device: torch.device | str = "cpu", keep: int = 0) -> Statistics:
    """The same of more images than fit in memory: only the moments, and the features to keep, stay there."""
    n = images.n
    if n < 2:
        raise UsageError("too few images for a covariance", f"{n} given, at least 2 are needed", "raise n")
    if not 0 <= keep <= n:
        raise UsageError(f"{keep} features can't be kept", f"there are {n} images, and one vector of each", f"keep 0 to {n}")
    hashed = _Hashed(images.batches, n)
    sums, spatial = RunningMoments(), RunningMoments()
    kept: list[torch.Tensor] = []
    wanted = {index * n // keep for index in range(keep)}
    for found in extractor.outputs(hashed, device):
        kept += [row.clone() for index, row in enumerate(found["features"], sums.n) if index in wanted]
        sums.add(found["features"])
        if "spatial" in found:
            spatial.add(found["spatial"])
    assert sums.n == n, f"{n} images were announced, {sums.n} came"
    features = torch.stack(kept) if kept else None
    return Statistics(sums.moments(), extractor.id, images.name, hashed.hexdigest(), spatial.moments(), features)


class RunningMoments:
    """Moments of feature vectors that come in batches, summed in order, in fp64, around the mean of the first batch."""

    def __init__(self) -> None:
        self.sums: Sums | None = None
        self.origin: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return self.sums.n if self.sums else 0

    def add(self, features: torch.Tensor) -> None:
        """Take features [B, F]."""
        x = features.double()
        if self.sums is None:
            self.origin = x.mean(0)
            self.sums = Sums.of(x, self.origin)
        else:
            self.sums = self.sums + Sums.of(x, self.origin)

    def moments(self) -> Moments | None:
        """Moments of at least 2 vectors; None when there were none."""
        return self.sums.moments(self.origin) if self.sums else None


def images_sha256(images: torch.Tensor) -> str:
    """Hash of the pixels and the shape."""
    hashed = _Hashed([images], len(images))
    assert sum(len(batch) for batch in hashed) == len(images)
    return hashed.hexdigest()


class _Hashed:
    """Batches passed through, and the hash of all their images: as if they were one tensor [n, 3, H, W]."""

    def __init__(self, batches: Iterable[torch.Tensor], n: int):
        self.batches, self.n = batches, n
        self._digest: Any = None

    def __iter__(self):
        for batch in self.batches:
            if self._digest is None:
                self._digest = hashlib.sha256(str([self.n, *batch.shape[1:]]).encode())
            self._digest.update(batch.contiguous().numpy().tobytes())
            yield batch

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def write_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write atomically: a temporary file beside it, then a rename."""
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "n": str(statistics.moments.n),
        "extractor": statistics.extractor_id,
        "data": statistics.data_name,
        "data_sha256": statistics.data_sha256,
    }
    tensors = {"mu": statistics.moments.mu.contiguous(), "sigma": statistics.moments.sigma.contiguous()}
    if statistics.spatial is not None:
        tensors |= {"mu_spatial": statistics.spatial.mu.contiguous(), "sigma_spatial": statistics.spatial.sigma.contiguous()}
    if statistics.features is not None:
        tensors["features"] = statistics.features.contiguous()
    write_file(path, save(tensors, metadata))


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read and check. Raises CheckpointError for a file that isn't one, or whose numbers are no mean and covariance."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            keys = set(file.keys())
            check(metadata.get("format") == FORMAT, path, f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
            check(keys - {"features"} in ({"mu", "sigma"}, {"mu", "sigma"} | SPATIAL), path, f"it holds {sorted(keys)}, expected mu and sigma")
            tensors = {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read statistics {path}", str(error), "give a file written by dite") from error
    text = metadata.get("n", "")
    check(text.isascii() and text.isdigit() and len(text) < 16 and int(text) >= 2, path, f"n is {text!r}, expected a number of at least 2")
    missing = [key for key in ("extractor", "data", "data_sha256") if not metadata.get(key)]
    check(not missing, path, f"metadata {', '.join(missing)} is missing")
    check_moments(tensors["mu"], tensors["sigma"], path)
    spatial, features = None, tensors.get("features")
    if keys >= SPATIAL:
        check_moments(tensors["mu_spatial"], tensors["sigma_spatial"], path)
        spatial = Moments(tensors["mu_spatial"], tensors["sigma_spatial"], int(text))
    if features is not None:
        fitting = features.dtype == torch.float32 and features.dim() == 2 and 0 < len(features) <= int(text)
        check(fitting and features.shape[1] == len(tensors["mu"]), path, f"features are {features.dtype} {list(features.shape)}")
        check(bool(torch.isfinite(features).all()), path, "a feature in it is not finite")
    found = Moments(tensors["mu"], tensors["sigma"], int(text))
    return Statistics(found, metadata["extractor"], metadata["data"], metadata["data_sha256"], spatial, features)


def inject_(metric: Any, reference: Moments) -> None:
    """Give a torchmetrics FrechetInceptionDistance its real side, in place and exactly.

    torchmetrics keeps sums: Σx = n·μ and Σxxᵀ = (n − 1)·Σ + n·μμᵀ.
    """
    metric.real_features_sum = reference.mu * reference.n
    metric.real_features_cov_sum = reference.sigma * (reference.n - 1) + reference.n * torch.outer(reference.mu, reference.mu)
    metric.real_features_num_samples = torch.tensor(reference.n)


def check_moments(mu: torch.Tensor, sigma: torch.Tensor, path: Any, hint: str = HINT) -> None:
    """Raise CheckpointError unless these are a mean fp64 [F] and a covariance fp64 [F, F]."""
    check(mu.dtype == sigma.dtype == torch.float64, path, f"mu is {mu.dtype} and sigma {sigma.dtype}, expected float64", hint)
    check(mu.dim() == 1 and sigma.shape == (len(mu), len(mu)) and len(mu) > 0, path, f"mu is {list(mu.shape)} and sigma {list(sigma.shape)}", hint)
    check(bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()), path, "a number in it is not finite", hint)
    scale = sigma.diagonal().abs().max().item()
    check((sigma - sigma.T).abs().max().item() <= 1e-9 * scale, path, "sigma is not symmetric", hint)
    with threads_for(len(mu)):
        lowest = torch.linalg.eigvalsh(sigma).min().item()
    check(lowest >= -1e-6 * scale, path, f"sigma is no covariance: its smallest eigenvalue is {lowest:.3g}", hint)


def check(holds: bool, path: Any, why: str, hint: str = HINT) -> None:
    """Raise CheckpointError unless `holds`."""
    if not holds:
        raise CheckpointError(f"{path} holds no usable statistics", why, hint)
