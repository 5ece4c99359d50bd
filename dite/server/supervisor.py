"""Keeps ranks alive: starts them, and starts all of them anew when one is lost, as often as is sensible."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from dite.errors import DiteError, RankLost
from dite.server import frames
from dite.server.card import ModelCard
from dite.server.logs import log
from dite.server.ranks import Ranks, RanksLost
from dite.server.settings import ServerSettings


class Listener(Protocol):
    """Who is told of the ranks."""

    def ranks_ready(self, ranks: Ranks, card: ModelCard) -> None:
        """They are warm."""

    def ranks_lost(self, lost: RanksLost) -> None:
        """They are no more; those after them are being started."""

    def rank_said(self, rank: int, message: frames.Message, raw: bytes) -> None:
        """A message of theirs."""


class RestartBudget:
    """At most `most` restarts within `window_s`."""

    def __init__(self, most: int, window_s: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._window_s, self._clock = most, window_s, clock
        self._times: deque[float] = deque()

    def spend(self) -> bool:
        """Count one; False when that is one too many."""
        now = self._clock()
        while self._times and now - self._times[0] > self._window_s:
            self._times.popleft()
        self._times.append(now)
        return len(self._times) <= self._most


class StartFailed(DiteError):
    """The ranks could not be started: what a rank said, or that it said nothing."""

    @classmethod
    def of(cls, lost: RanksLost) -> StartFailed:
        """With the rank's own words and exit code."""
        said = lost.error or {"what": lost.reason, "why": "it said nothing of the reason", "try": "look at the log above"}
        failed = cls(said["what"], said["why"], said["try"])
        failed.exit_code = lost.exit_code
        return failed


class Supervisor:
    """`run` ends when it is cancelled, or by an error when ranks can't be kept alive."""

    def __init__(self, settings: ServerSettings, listener: Listener):
        self.settings, self.listener = settings, listener
        self.ranks: Ranks | None = None
        self._budget = RestartBudget(settings.max_restarts, settings.restart_window_s)

    async def run(self) -> None:
        """Start ranks, watch them, start them again. Raises StartFailed where the first ones can't start, RankLost after too many restarts."""
        first = True
        while True:
            self.ranks = Ranks(self.settings, self.listener.rank_said)
            try:
                card = await self.ranks.start()
                log("ranks_ready", pids=[one.popen.pid for one in self.ranks.processes], card={"pipeline": card.pipeline, "exchange": card.exchange})
                first = False
                self.listener.ranks_ready(self.ranks, card)
                lost = await self.ranks.lost()
            except RanksLost as failed:
                if first:
                    raise StartFailed.of(failed) from None
                lost = failed
            finally:
                await asyncio.shield(self.ranks.kill())
            log("ranks_lost", reason=lost.reason, said=lost.error)
            self.listener.ranks_lost(lost)
            if not self._budget.spend():
                limit = f"{self.settings.max_restarts} restarts within {self.settings.restart_window_s:g} s are allowed"
                raise RankLost("the ranks keep dying", f"{limit}; the last time {lost.reason}", "look at the log for what they said")
