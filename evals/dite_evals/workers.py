"""The processes that draw an evaluation's samples together: one alone, or the ranks of `--nproc N`, `accelerate launch` or torchrun.

They share a folder, not tensors: each draws its part of the units of work, writes it there, and waits for the others; then all read everything.
Nothing depends on which rank did what, so that neither their number nor a new beginning changes a result.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dite.errors import RankLost, UsageError
from dite.parallel.launch import RENDEZVOUS, environment_ranks, keeping_stdout

DEADLINE = timedelta(days=2)  # a rank waits for another's whole part of a long run; one that dies is noticed at once


@dataclass(frozen=True)
class Workers:
    """`rank` of `size` processes. `in_step`: all of them run one pipeline that is shared out, so that each does all the work and rank 0 writes."""

    rank: int = 0
    size: int = 1
    in_step: bool = False
    state: Any = None

    @property
    def writes(self) -> bool:
        return self.rank == 0 or not self.in_step

    def part(self, work: Sequence[Any]) -> list[Any]:
        """This rank's part of a list that all ranks hold alike."""
        return list(work) if self.in_step else list(work[self.rank :: self.size])

    def wait(self) -> None:
        """Until every rank is here. Raises RankLost when one has gone."""
        if self.state is None:
            return
        try:
            self.state.wait_for_everyone()
        except RuntimeError as error:
            lines = str(error).splitlines() or [""]
            raise RankLost("another rank of this evaluation has gone", lines[0], "run the same command again: what is drawn is kept") from error

    def device(self, device: str) -> str:
        """Where this rank's model goes: card i of this machine for its i-th rank, where `device` names none."""
        return f"cuda:{self.state.local_process_index}" if device == "cuda" and self.state is not None else device


def join(in_step: bool = False) -> Workers:
    """Meet the other ranks that the environment tells of; alone without. Figures and files go through the CPU, whatever the models run on."""
    place = environment_ranks()
    if place is None or place[1] == 1:
        return Workers()
    from accelerate import PartialState
    from torch import distributed

    rank, size = place
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate would say that it chose a number
    try:
        with keeping_stdout():
            if not distributed.is_initialized() and RENDEZVOUS in os.environ:
                store = distributed.FileStore(os.environ[RENDEZVOUS], size)
                distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=DEADLINE)
            state = PartialState(cpu=True) if distributed.is_initialized() else PartialState(cpu=True, timeout=DEADLINE)
    except (ValueError, RuntimeError) as error:
        raise RankLost("the ranks don't meet", str(error).splitlines()[0], "start them with --nproc, accelerate launch or torchrun") from error
    return Workers(rank, size, in_step, state)


def scratch() -> Path:
    """A folder that the ranks of --nproc share and that goes with them. Raises UsageError where nobody made one."""
    if RENDEZVOUS not in os.environ:
        raise UsageError("several ranks need a folder to meet in", "no output was given, and they share nothing else", "give -o")
    return Path(os.environ[RENDEZVOUS]).parent / "evaluation"
