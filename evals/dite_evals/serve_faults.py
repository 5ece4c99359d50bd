"""What a server goes through before it is let near people: every fault of the table, how often it is injected, and what came of it.

Rows are functions of a count and a model that start a server of their own, and return figures and whether the goal was met.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dite_evals import serve_faults_ends as ends
from dite_evals import serve_faults_input as inputs
from dite_evals import serve_faults_load as load
from dite_evals import serve_faults_logs as logs
from dite_evals import serve_faults_ranks as ranks


@dataclass(frozen=True)
class Row:
    """`inject(count, model)`; the count of a full run, and of a quick one."""

    inject: Callable[[int, str], Awaitable[dict[str, Any]]]
    full: int
    quick: int

    def run(self, count: int, model: str) -> dict[str, Any]:
        """The row's figures. One that can't be finished has missed its goal, and says why."""
        began = time.monotonic()
        with Stalls() as stalls:
            try:
                figures = asyncio.run(self.inject(count, model))
            except Exception as error:
                line = (str(error).strip().splitlines() or [""])[0]
                figures = {"trials": count, "error": f"{type(error).__name__}: {line}", "missed": ["finished"], "ok": False}
        machine = {"load_average": round(os.getloadavg()[0], 2), "longest_stall_s": round(stalls.longest_s, 2)}
        return {"count": count, "model": model} | figures | {"took_s": round(time.monotonic() - began, 1)} | machine


class Stalls:
    """How long this process stood still at a time, from outside or for want of a core: what then came late is nobody's fault."""

    EVERY_S = 0.1

    def __init__(self):
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            before = time.monotonic()
            self._over.wait(self.EVERY_S)
            self.longest_s = max(self.longest_s, time.monotonic() - before - self.EVERY_S)


ROWS = {
    "overload": Row(load.overload, full=60, quick=8),  # seconds
    "slow_sockets": Row(load.slow_sockets, full=200, quick=40),
    "disconnects": Row(load.disconnects, full=500, quick=40),
    "malformed": Row(inputs.malformed, full=50_000, quick=2_000),
    "prompts_in_logs": Row(logs.prompts_in_logs, full=5, quick=1),
    "rank_killed": Row(ranks.rank_killed, full=100, quick=2),
    "one_of_two_ranks_killed": Row(ranks.one_of_two_ranks_killed, full=20, quick=1),
    "rank_stopped": Row(ranks.rank_stopped, full=30, quick=2),
    "poison": Row(ranks.poison, full=20, quick=1),
    "crash_loop": Row(ranks.crash_loop, full=6, quick=2),
    "not_a_number": Row(ranks.not_a_number, full=300, quick=6),
    "not_a_number_on_two_ranks": Row(ranks.not_a_number_on_two_ranks, full=100, quick=4),
    "out_of_memory": Row(ranks.out_of_memory, full=50, quick=3),
    "out_of_memory_on_two_ranks": Row(ranks.out_of_memory_on_two_ranks, full=30, quick=2),
    "told_to_stop": Row(ends.told_to_stop, full=50, quick=2),
    "told_twice": Row(ends.told_twice, full=10, quick=1),
    "supervisor_killed": Row(ends.supervisor_killed, full=30, quick=3),
    "two_servers": Row(ends.two_servers, full=20, quick=2),
}
