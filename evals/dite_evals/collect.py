"""From a source, whatever it is, to reference statistics: what `dite eval stats` does.

    images               folder, parquet or .npz   through the extractor
    statistics as .npz   of ADM, of clean-fid      imported for the extractor that is said to have made them
    statistics of dite   .safetensors              read, to be written as .npz

Never two extractors in one file: what is imported must have as many features as the extractor gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dite.errors import UsageError
from dite_evals.extractors import Extractor
from dite_evals.image_sources import chosen, open_images, read_batches
from dite_evals.statistics import ImageSet, Statistics, gather_statistics, read_statistics
from dite_evals.statistics_npz import holds_statistics, read_npz, require_width

EXTRACTOR_ID = re.compile(r"[^/]+/[^/]+/sha256:[0-9a-f]{64}")

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What of a source: a `split`, `n` of its images, each cut to the middle square of `image_size` pixels; features to `keep`."""

    split: str | None = None
    n: int | None = None
    image_size: int | None = None
    keep: int = 0


def collect(source: Path, extractor: Extractor | str | None, wanted: Wanted, progress: Tick, device: str = "cpu") -> Statistics:
    """The statistics of `source`. `extractor` may be the bare id of one where statistics are imported, and None where they know it."""
    if source.suffix == ".safetensors":
        return _read(source, extractor, wanted)
    if extractor is None:
        raise UsageError("no extractor was named", "statistics are those of one extractor", "--extractor inception, or builtin:cifar10-dit")
    if _is_import(source):
        return _import(source, extractor, wanted, progress, device)
    if not isinstance(extractor, Extractor):
        raise UsageError(
            "an extractor's id can't look at images", f"{source} holds images, and {extractor[:40]}… is no extractor", "name one that runs"
        )
    return gather_statistics(extractor, _images(source, extractor, wanted, progress), device, wanted.keep)


def plan(source: Path, extractor: Extractor | str | None, wanted: Wanted) -> dict[str, Any]:
    """What `collect` would do, after the checks that need no extraction: `does, n, extractor`."""
    if source.suffix == ".safetensors" or _is_import(source):
        statistics = collect(source, extractor, replace(wanted, keep=0), lambda _what, _done, _total: None)
        return {"dry_run": True, "does": "read" if source.suffix == ".safetensors" else "import", **statistics.facts()}
    found = open_images(source, wanted.split)
    check_keep(wanted.keep, len(chosen(found.count, wanted.n)))
    named = extractor.id if isinstance(extractor, Extractor) else extractor
    return {"dry_run": True, "does": "compute", "n": len(chosen(found.count, wanted.n)), "extractor": named, "data": found.name}


def check_keep(keep: int, n: int) -> None:
    """Raise UsageError for more features to keep than there are images."""
    if keep > n:
        raise UsageError(f"{keep} features can't be kept", f"there are {n} images, and one vector of each", f"use --keep-features {n} or less")


def _is_import(source: Path) -> bool:
    return source.suffix == ".npz" and source.is_file() and holds_statistics(source)


def _read(source: Path, extractor: Extractor | str | None, wanted: Wanted) -> Statistics:
    if wanted != Wanted():
        raise UsageError(f"{source} is finished", "statistics can't be split, cut or counted anew", "give the images instead")
    statistics = read_statistics(source)
    if isinstance(extractor, Extractor):
        statistics.require(extractor)
    return statistics


def _import(source: Path, extractor: Extractor | str, wanted: Wanted, progress: Tick, device: str) -> Statistics:
    if wanted.split or wanted.image_size:
        raise UsageError(f"{source} holds statistics", "what they were computed from can't be split or cut any more", "leave those flags out")
    statistics = read_npz(source, extractor if isinstance(extractor, str) else extractor.id, wanted.n)
    if isinstance(extractor, str):
        if wanted.keep:
            raise UsageError("an extractor's id gives no features", f"{wanted.keep} are to be kept", "name an extractor that runs")
        return statistics
    require_width(statistics, extractor)
    check_keep(wanted.keep, statistics.moments.n)
    if not wanted.keep:
        return statistics
    keep = replace(wanted, n=wanted.keep)
    images = gather_statistics(extractor, _images(source, extractor, keep, progress), device, wanted.keep)
    return replace(statistics, features=images.features)


def _images(source: Path, extractor: Extractor, wanted: Wanted, progress: Tick) -> ImageSet:
    found = open_images(source, wanted.split)
    indices = chosen(found.count, wanted.n)
    name = found.name if wanted.image_size is None else f"{found.name}, middle {wanted.image_size}×{wanted.image_size}"

    def batches() -> Iterator[torch.Tensor]:
        done = 0
        for batch in read_batches(found, indices, extractor.batch_size, wanted.image_size):
            yield batch
            done += len(batch)
            progress("features", done, len(indices))

    return ImageSet(name, len(indices), batches())
