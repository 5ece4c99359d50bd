"""Who may wait, and who goes first: a queue bounded by work, not by heads. Pure: no clock of its own, no threads, no I/O.

    wait of a new job  =  (work waiting + work running) / work per second
    admitted if        work waiting + its own ≤ bound,  and  now + wait + its own time ≤ its deadline

Work per second is measured; before the first measurement everybody within the bound is admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dite.server.job import Job
from dite.server.problems import Problem

FORGETTING = 0.1  # weight of the newest measurement


class Rate:
    """Work done a second while everything is busy, and seconds a step; exponential means."""

    def __init__(self) -> None:
        self.per_second: float | None = None
        self.step_s: float | None = None

    def observe(self, work: float, seconds: float) -> None:
        """One step did so much work."""
        if seconds <= 0 or work <= 0:
            return
        speed = work / seconds
        # An empty server draws one picture at a time and batches gain nothing: what counts is how fast it gets when there is much to do.
        weight = FORGETTING if self.per_second is None or speed >= self.per_second else FORGETTING / 10
        self.per_second = speed if self.per_second is None else (1 - weight) * self.per_second + weight * speed
        self.step_s = seconds if self.step_s is None else (1 - FORGETTING) * self.step_s + FORGETTING * seconds


class Admission:
    """The queue. `bound` is the most work that may wait; `clock` gives seconds."""

    def __init__(self, bound: float, clock: Callable[[], float]):
        self.bound, self.clock = bound, clock
        self.rate = Rate()
        self.running = 0.0  # work under way, kept by whoever takes jobs out
        self._waiting: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> float:
        """Work in the queue."""
        return sum(job.request.cost for job in self._waiting)

    def offer(self, job: Job, at_once: bool = False) -> None:
        """Let a job wait; one that begins `at_once` needs no room. Raises Problem 429 when the queue is full, or when its pictures would come too
        late."""
        waiting, cost = self.waiting, job.request.cost
        if not at_once and waiting + cost > self.bound:
            raise Problem(429, "queue_full", self._full(waiting), retry_after_s=self.seconds(max(waiting + cost - self.bound, cost)))
        late_s = self.clock() + self.seconds(waiting + self.running + cost) - job.deadline_s
        if late_s > 0:
            allowed = job.deadline_s - job.arrived_s
            message = (
                f"these pictures would be done {late_s:.1f} s after the request's deadline of {allowed:g} s; ask for less, allow more, or come back"
            )
            raise Problem(429, "deadline_unreachable", message, retry_after_s=late_s)
        self._waiting.append(job)

    def first(self) -> Job | None:
        """Who goes next."""
        return self._waiting[0] if self._waiting else None

    def take(self) -> Job:
        """Take that one out."""
        return self._waiting.popleft()

    def remove(self, job: Job) -> bool:
        """Take out one that doesn't want to wait any longer; False when it isn't waiting."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def put_back(self, jobs: list[Job]) -> None:
        """Jobs that have to be drawn once more go first, in their order."""
        self._waiting.extendleft(reversed(jobs))

    def everyone(self) -> list[Job]:
        """All that wait, in order."""
        return list(self._waiting)

    def seconds(self, work: float) -> float:
        """How long so much work takes; 0 as long as nobody knows."""
        return work / self.rate.per_second if self.rate.per_second else 0.0

    def _full(self, waiting: float) -> str:
        wait = self.seconds(waiting + self.running)
        return f"{len(self._waiting)} requests are waiting, about {wait:.1f} s of work, and this one doesn't fit behind them; come back later"
