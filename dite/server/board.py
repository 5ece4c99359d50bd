"""What the replicas of one `dite serve --engine ray` and the command itself know of each other: an actor that lives as long as the command.

Replicas report what they are and what they have counted; the command reads that, and says when to stop. The API key passes through here on its way to
replicas, so that it stands in no deployment's configuration, which Ray stores and shows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

NAMESPACE = "dite"
SILENT_S = 5.0  # a replica that reports nothing for so long isn't counted among those that live
GONE_S = 30.0


class Stage(IntEnum):
    """How far the end of the server has come."""

    SERVING = 0
    DRAINING = 1
    ABORTING = 2


@dataclass(frozen=True)
class Report:
    """A replica's last word: "ready", or what else its service is, or "drained"; and its page of metrics."""

    state: str
    metrics: str
    at_s: float


class Board:
    """The actor. All of it runs in one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._key: str | None = None
        self._stage = Stage.SERVING
        self._changed = asyncio.Event()
        self._reports: dict[str, Report] = {}
        self._failure: dict[str, Any] | None = None

    async def set_key(self, key: str | None) -> None:
        """Called once, before any replica is made."""
        self._key = key

    async def key(self) -> str | None:
        """What clients must send."""
        return self._key

    async def report(self, replica: str, state: str, metrics: str) -> dict[str, str]:
        """Take a replica's word, and answer with the metrics of all of them."""
        now = self._clock()
        self._reports[replica] = Report(state, metrics, now)
        self._reports = {name: report for name, report in self._reports.items() if now - report.at_s <= SILENT_S}
        return {name: report.metrics for name, report in self._reports.items()}

    async def failed(self, error: dict[str, str], exit_code: int) -> None:
        """A replica could not be made, or its ranks can't be kept alive. `error` as of DiteError.to_dict."""
        self._failure = error | {"exit_code": exit_code}

    async def look(self) -> dict[str, Any]:
        """For the command: the states of replicas that live, and the last failure."""
        now = self._clock()
        return {"states": {name: one.state for name, one in self._reports.items() if now - one.at_s <= SILENT_S}, "failure": self._failure}

    async def go_on_to(self, stage: int) -> None:
        """Tell all replicas."""
        self._stage = max(self._stage, Stage(stage))
        self._changed.set()
        self._changed = asyncio.Event()

    async def stage_after(self, stage: int) -> int:
        """The stage, as soon as it is later than `stage`."""
        while self._stage <= stage:
            await self._changed.wait()
        return int(self._stage)


class Roll:
    """Who has yet to say that it has drained. One that falls silent may only be busy, or its board may: it is waited for until GONE_S."""

    def __init__(self):
        self._last: dict[str, tuple[str, float]] = {}

    def hear(self, states: dict[str, str], now: float) -> None:
        """What replicas say of themselves."""
        self._last |= {name: (state, now) for name, state in states.items()}

    def is_over(self, now: float) -> bool:
        """Whether every replica that was ever heard has drained, failed, or is gone."""
        return bool(self._last) and all(state in ("drained", "failed") or now - at_s > GONE_S for state, at_s in self._last.values())


def merged(pages: dict[str, str]) -> bytes:
    """One page of metrics from those of several replicas: every sample gets a label `ray_replica`.

    Whichever replica answers a scrape speaks for all. Else counters would seem to fall whenever another one answers.
    """
    registry = CollectorRegistry()
    registry.register(_Pages(pages))
    return generate_latest(registry)


class _Pages:
    def __init__(self, pages: dict[str, str]):
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        families: dict[str, Metric] = {}
        for replica, page in sorted(self._pages.items()):
            for one in text_string_to_metric_families(page):
                family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    family.add_sample(sample.name, {"ray_replica": replica, **sample.labels}, sample.value)
        yield from families.values()
