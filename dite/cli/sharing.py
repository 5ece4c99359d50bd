"""`--nproc`, `--mode`, `--codec` and `--order`: starting the ranks of a command, and sharing its pipeline out in each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dite.errors import UsageError
from dite.parallel.launch import environment_ranks, start_ranks
from dite.parallel.rates import parse_codec
from dite.parallel.schedule import Schedule
from dite.parallel.topology import parse


def placed(nproc: int | None) -> tuple[int, int, bool]:
    """This process's rank, how many there are, and whether they are yet to be started: by `--nproc` and the environment."""
    place = environment_ranks()
    if place and nproc not in (None, place[1]):
        rule = f"this process was started as one of {place[1]} ranks"
        raise UsageError(f"--nproc {nproc} doesn't fit", rule, "leave --nproc out under torchrun")
    return (*place, False) if place else (0, nproc or 1, (nproc or 1) > 1)


@dataclass(frozen=True)
class Sharing:
    """How a command's pictures are shared out. `rank` is this process's; `to_start`: the ranks are yet to be started."""

    degree: int
    mode: str
    codec: str
    order: int
    rank: int = 0
    to_start: bool = False

    @classmethod
    def of(cls, nproc: int | None, mode: str, codec: str, order: int) -> Sharing:
        """From the flags and the environment; a mode, codec or degree that can't be is refused before anything starts."""
        rank, degree, to_start = placed(nproc)
        parse("kv_gather" if mode == "auto" else mode, degree)
        if codec.endswith(".json"):
            Schedule.read(Path(codec))
        elif codec != "auto":
            parse_codec(codec)
        return cls(degree, mode, codec, order, rank, to_start)

    def start(self, arguments: Sequence[str]) -> int:
        """Run the command's ranks; returns rank 0's exit code."""
        return start_ranks(self.degree, arguments)

    @contextmanager
    def share(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """Inside, `pipe` is shared out; the dict holds the exchange's figures afterwards, and stays empty on one device."""
        figures: dict[str, Any] = {}
        if self.degree == 1:
            yield figures
            return
        from dite.parallel.handle import parallelize

        with parallelize(pipe, self.degree, self.mode, self._codec(), order=self.order) as par:
            yield figures
            figures |= par.stats()

    def _codec(self) -> Any:
        return Schedule.read(Path(self.codec)) if self.codec.endswith(".json") else self.codec
