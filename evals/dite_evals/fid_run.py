"""The samples of a FID run and their features: drawn unit by unit, by any number of ranks, kept on disk, and gone on with after an interruption.

A unit is the fewest samples that make whole micro-batches of the model and whole batches of the extractor. Within it every sample has its row in
both, so that neither the number of ranks, nor where a run was interrupted, nor how many samples a shard holds changes a bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dite.outputs import OutputLock
from dite_evals.extractors import Extractor
from dite_evals.shards import Shards, Span, begin, claim, digest
from dite_evals.workers import Workers

SHEET = 100  # images that a report shows

Draw = Callable[[int, int, Callable[[int], None]], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class FidRun:
    """What is to be drawn, and where it is kept.

    `draw(start, stop, tick)` yields the images uint8 [3, H, W] of samples start..stop−1, where `start` is a multiple of the micro-batch, and calls
    `tick(done)` after each of the `steps` of each micro-batch. A file of images holds `shard` samples, one micro-batch at least. With
    `features_only` the images of a unit are deleted once their features are stored, but for the first SHEET.
    """

    folder: Path
    configuration: dict[str, Any]
    extractor: Extractor
    n: int
    micro_batch: int
    steps: int
    draw: Draw
    workers: Workers
    device: torch.device | str = "cpu"
    shard: int = 1
    features_only: bool = False
    discard: bool = False
    progress: Callable[[int, int], None] = lambda _done, _total: None

    def features(self) -> dict[str, torch.Tensor]:
        """`features` fp32 [N, F] and whatever else the extractor gives, in order of the samples; every rank gets all.

        Raises ResumeConflict, NonFiniteOutput, RankLost, and DiteError for a full disk.
        """
        stale = claim(self.folder, self.configuration, self.discard)
        self.workers.wait()  # all ranks have looked before one changes anything
        with OutputLock(self.folder) if self.workers.rank == 0 else nullcontext():
            if self.workers.rank == 0:
                begin(self.folder, self.configuration, stale)
            self.workers.wait()
            claim(self.folder, self.configuration)  # a rank on another kind of machine, or with other threads, would draw other bits
            self.workers.wait()
            return self._gather()

    def _gather(self) -> dict[str, torch.Tensor]:
        writes, key = self.workers.writes, {"config": digest(self.configuration)}
        images = Shards(self.folder, key, writes)
        name = f"features-{hashlib.sha256(self.extractor.id.encode()).hexdigest()[:12]}"
        features = Shards(self.folder / name, key | {"extractor": self.extractor.id}, writes)
        unit = math.lcm(self.micro_batch, self.extractor.batch_size)
        units = [(start, min(start + unit, self.n)) for start in range(0, self.n, unit)]
        mine = self.workers.part([span for span in units if not features.covers(*span)])
        self.workers.wait()  # none writes before all have looked
        ticks = _Ticks(self.progress, self.steps * sum(self._batches(span) for span in mine))
        for start, stop in mine:
            drawn = self._unit(images, (start, stop), ticks)
            features.write(start, self.extractor.extract_all(drawn, self.device))
            if self.features_only and not self.workers.in_step:  # ranks in step may still read them
                images.drop(max(start, SHEET), stop)
        self.workers.wait()
        features.refresh()
        if self.features_only and self.workers.rank == 0:  # what was left by ranks in step, and by a run that was killed or kept its images
            images.refresh()
            images.drop(SHEET, self.n)
        return features.read(0, self.n)

    def sheet(self) -> torch.Tensor | None:
        """The first images, uint8 [at most SHEET, 3, H, W], where they were kept."""
        images, most = Shards(self.folder, {"config": digest(self.configuration)}), min(self.n, SHEET)
        return images.read(0, most)["images"] if images.covers(0, most) else None

    def _unit(self, images: Shards, span: Span, ticks: _Ticks) -> torch.Tensor:
        """Images of one unit: from disk, and what is missing drawn. A ragged micro-batch of a shorter run is drawn again, whole."""
        parts, (at, stop) = [], span
        for gap, end in [*images.missing(*span), (stop, stop)]:
            first = gap if gap == stop else gap // self.micro_batch * self.micro_batch
            if first > at:
                parts.append(images.read(at, first)["images"])
                ticks.add(self.steps * self._batches((at, first)))
            if end > first:
                parts.append(self._draw(images, (first, end), ticks))
            at = end
        return torch.cat(parts)

    def _draw(self, images: Shards, span: Span, ticks: _Ticks) -> torch.Tensor:
        fresh: list[torch.Tensor] = []
        size = max(1, self.shard // self.micro_batch) * self.micro_batch
        for index, image in enumerate(self.draw(*span, ticks.within), span[0]):
            fresh.append(image)
            if (index + 1 - span[0]) % size == 0 or index + 1 == span[1]:
                stored = (index - span[0]) // size * size
                images.write(span[0] + stored, {"images": torch.stack(fresh[stored:])})
        ticks.add(self.steps * self._batches(span))
        return torch.stack(fresh)

    def _batches(self, span: Span) -> int:
        return -(-(span[1] - span[0]) // self.micro_batch)


class _Ticks:
    """Steps done of a total, over several draws."""

    def __init__(self, progress: Callable[[int, int], None], total: int):
        self.progress, self.total, self.done = progress, total, 0

    def within(self, done: int) -> None:
        """`done` steps of the draw that is under way."""
        self.progress(self.done + done, self.total)

    def add(self, done: int) -> None:
        self.done += done
        self.progress(self.done, self.total)
