"""The server without HTTP: takes requests in, gives them to ranks, and sees to it that each one ends exactly once.

Ranks may die at any moment. What they were drawing is put back at the head of the queue and drawn once more, one request at a time, so that a
request that kills its ranks is known for it: it is refused the second time. For a while so are others like it, where the ranks ended by themselves;
if they were killed from outside, which on a model of ten classes may happen to anybody, only after the same has happened to a second such request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from dite.errors import DiteError
from dite.server import frames
from dite.server.admission import Admission
from dite.server.batching import fits
from dite.server.card import ModelCard
from dite.server.job import ATTEMPTS, ImageRequest, Job, Partial, Pictures, Progress
from dite.server.logs import log
from dite.server.metrics import Metrics
from dite.server.problems import Problem
from dite.server.ranks import Ranks, RanksLost
from dite.server.settings import ServerSettings
from dite.server.supervisor import Supervisor

QUARANTINE_S = 60.0


class Service:
    """`await run()` keeps it going; `submit` and `cancel` are called in the same event loop."""

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic):
        self.settings, self.clock = settings, clock
        self.card: ModelCard | None = None
        self.metrics = Metrics()
        self.state = "starting"
        self.supervisor = Supervisor(settings, self)
        self.admission = Admission(float("inf"), clock)
        self._ranks: Ranks | None = None
        self._running: dict[str, Job] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._quarantine: dict[ImageRequest, float] = {}
        self._suspects: dict[ImageRequest, float] = {}  # kinds that have lost their ranks twice, which may have been nobody's fault
        self._restarts = self._images = 0
        self._began_s = clock()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_ready(self) -> bool:
        """All ranks alive and warm, and new requests welcome."""
        return self.state == "ready"

    async def run(self) -> None:
        """Until cancelled. Raises StartFailed or RankLost; whoever waits then is told."""
        try:
            await self.supervisor.run()
        except Exception as error:
            self.state = "failed"
            reason = error.what if isinstance(error, DiteError) else type(error).__name__
            self._end_all(Problem(503, "server_failed", f"the server is going down: {reason}"))
            raise
        finally:
            self._ranks = None

    def submit(self, request: ImageRequest, timeout_s: float | None = None) -> Job:
        """Accept a request: from now on it ends exactly once. Raises Problem: 429 when there is too much to do, 503 when nothing is done at all."""
        if self.state in ("draining", "failed"):
            raise Problem(503, "shutting_down", "the server is shutting down", retry_after_s=10)
        if self.card is None:
            raise Problem(503, "starting", "the model is being loaded", retry_after_s=5)
        self._refuse_poison(request)
        now = self.clock()
        limit = self.settings.limits.request_timeout_s
        job = Job(request, arrived_s=now, deadline_s=now + min(timeout_s or limit, limit))
        self.admission.offer(job, at_once=not len(self.admission) and self._fits(job, fresh=not self._running))
        self._idle.clear()
        self._timers[job.id] = asyncio.get_running_loop().call_later(job.deadline_s - now, self._expire, job)
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """The client has left."""
        self._give_up(job, Problem(499, "cancelled", "the client has closed the connection"))

    def close_doors(self) -> None:
        """Accept nothing from now on."""
        if self.state != "failed":
            self.state = "draining"

    async def drain(self) -> bool:
        """Take nothing new in and wait until all that was accepted has ended. False when that took longer than it may: then the rest is told so."""
        self.close_doors()
        log("draining", waiting=len(self.admission), running=len(self._running))
        try:
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_timeout_s)
        except TimeoutError:
            self.abort()
            return False
        return True

    def abort(self) -> None:
        """End everything at once."""
        self.close_doors()
        self._end_all(Problem(503, "shutting_down", "the server was stopped before these pictures were done"))

    def status(self) -> dict[str, Any]:
        """How the server is, for its page."""
        return {
            "state": self.state,
            "model": self.settings.served_name,
            "queue": {"depth": len(self.admission), "cost_s": self.admission.seconds(self.admission.waiting + self.admission.running)},
            "running": len(self._running),
            "ranks": self._ranks.facts() if self._ranks else [],
            "images": self._images,
            "restarts": self._restarts,
            "seconds_per_step": self.admission.rate.step_s,
            "uptime_s": self.clock() - self._began_s,
        }

    def ranks_ready(self, ranks: Ranks, card: ModelCard) -> None:
        """They are warm: go on with what waits."""
        self._ranks, self.card = ranks, card
        self.admission.bound = self.settings.max_queue * self._usual_cost(card)
        if self.state in ("starting", "restarting"):
            self.state = "ready"
        for process in ranks.processes:
            self.metrics.rank(process.number, process.popen.pid, process.memory_bytes)
        self._dispatch()

    def ranks_lost(self, lost: RanksLost) -> None:
        """Draw again what they were drawing, unless it was their second time."""
        self._ranks = None
        self._restarts += 1
        self.metrics.restart()
        if self.state == "ready":
            self.state = "restarting"
        running, self._running = list(self._running.values()), {}
        self._count_running()
        again = [job for job in running if job.ended is None and job.attempts < ATTEMPTS]
        for job in running:
            if job.ended is None and job.attempts >= ATTEMPTS:
                self._suspect(job, lost)
                told = f"the ranks were lost twice while they drew this ({lost.reason}); it will not be tried again"
                self._end(job, Problem(500, "poison", told, retry=False))
        self.admission.put_back(again)
        self._settle()

    def rank_said(self, rank: int, message: frames.Message, raw: bytes) -> None:
        """Progress, pictures, failures and heartbeats."""
        if message["type"] == "alive":
            pid = self._ranks.processes[rank].popen.pid if self._ranks else None
            self.metrics.rank(rank, pid, message["memory_bytes"])
            self.metrics.exchange(rank, message["raw"], message["sent"])
        elif message["type"] == "steps":
            self._stepped(message)
        else:
            job = self._running.get(message["job"])
            if job is None:
                return
            if message["type"] == "partial":
                job.report(Partial(message["index"], raw))
                return
            del self._running[job.id]
            self._count_running()
            if message["type"] == "done":
                self._done(job, message, raw)
            elif message["type"] == "failed":
                self._end(job, _problem(message))
            self._due()
            self._dispatch()

    def _stepped(self, message: frames.Message) -> None:
        work = 0.0
        for name, step in message["steps"].items():
            job = self._running.get(name)
            if job is not None:
                work += job.request.cost / job.request.steps
                job.report(Progress(step, job.request.steps))
        self.admission.rate.observe(work, message["seconds"])
        self.metrics.step(message["seconds"], message["pictures"])
        self._due()

    def _done(self, job: Job, message: frames.Message, raw: bytes) -> None:
        images, start = [], 0
        for size in message["sizes"]:
            images.append(raw[start : start + size])
            start += size
        now, started = self.clock(), job.started_s or job.arrived_s
        self._images += len(images)
        self.metrics.images(len(images))
        self._end(job, Pictures(images, started - job.arrived_s, now - started, job.attempts, message["seconds"]))

    def _dispatch(self) -> None:
        """Give ranks as much as they can draw at once."""
        fresh = not self._running
        while (job := self.admission.first()) is not None and self._fits(job, fresh):
            self.admission.take()
            now = self.clock()
            if job.started_s is None:
                job.started_s = now
                self.metrics.waited(now - job.arrived_s)
            job.attempts += 1
            self._running[job.id] = job
            self._count_running()
            self._ranks.send({"type": "start", "job": job.id, "request": asdict(job.request)})
            if self._ranks.step_due_s is None:  # whoever joins a step that never ends doesn't give it more time
                self._due()
        self._settle()

    def _fits(self, job: Job, fresh: bool) -> bool:
        settings, running = self.settings, list(self._running.values())
        if self._ranks is None or not fits(settings.batching, settings.max_batch, job, running, fresh):
            return False
        return not running or sum(self.card.seconds(one.request) for one in (job, *running)) <= settings.step_timeout_s

    def _count_running(self) -> None:
        self.admission.running = sum(job.request.cost for job in self._running.values())

    def _due(self) -> None:
        if self._ranks is not None:
            self._ranks.step_due_s = time.monotonic() + self.settings.step_timeout_s if self._running else None

    def _expire(self, job: Job) -> None:
        allowed = job.deadline_s - job.arrived_s
        self._give_up(job, Problem(504, "deadline_exceeded", f"the pictures were not done within {allowed:g} s", retry=False))

    def _give_up(self, job: Job, problem: Problem) -> None:
        if job.ended is not None:
            return
        if not self.admission.remove(job) and job.id in self._running and self._ranks is not None:
            self._ranks.send({"type": "cancel", "job": job.id}, to=0)  # its place is free when rank 0 says so
        self._end(job, problem)
        self._dispatch()

    def _end(self, job: Job, end: Pictures | Problem) -> None:
        job.report(end)
        if (timer := self._timers.pop(job.id, None)) is not None:
            timer.cancel()
        if isinstance(end, Problem):
            log("job_failed", job=job.id, code=end.code, attempts=job.attempts)

    def _end_all(self, problem: Problem) -> None:
        for job in [*self.admission.everyone(), *self._running.values()]:
            self._give_up(job, problem)
        self._settle()

    def _settle(self) -> None:
        self.metrics.queue(len(self.admission))
        if not len(self.admission) and not any(job.ended is None for job in self._running.values()):
            self._idle.set()

    def _suspect(self, job: Job, lost: RanksLost) -> None:
        """Remember what kind of request has just lost its ranks for the second time, alone: the first time others were drawn beside it."""
        kind, now = _kind(job.request), self.clock()
        guilty = lost.own or self._suspects.get(kind, now) > now
        (self._quarantine if guilty else self._suspects)[kind] = now + QUARANTINE_S
        log("job_quarantined" if guilty else "job_given_up", job=job.id, reason=lost.reason)

    def _refuse_poison(self, request: ImageRequest) -> None:
        now = self.clock()
        self._quarantine = {kind: until for kind, until in self._quarantine.items() if until > now}
        self._suspects = {kind: until for kind, until in self._suspects.items() if until > now}
        if _kind(request) in self._quarantine:
            raise Problem(500, "poison", "a request like this has lost its ranks twice; it is not tried again for a while", retry=False)

    def _usual_cost(self, card: ModelCard) -> float:
        width, height = card.default_size_px
        steps, guidance = min(self.settings.steps, card.most_steps), self.settings.guidance
        return ImageRequest(condition=0, n=1, seed=0, steps=steps, guidance=guidance, width_px=width, height_px=height).cost


def _kind(request: ImageRequest) -> ImageRequest:
    """What poison is known by: clients that try again often choose another seed."""
    return replace(request, seed=0)


def _problem(message: frames.Message) -> Problem:
    error = message["error"]
    text = ": ".join(part for part in (error["what"], error["why"]) if part)
    if message["memory"]:
        return Problem(500, "out_of_memory", f"there was not enough memory for this request ({text}); ask for fewer or smaller pictures", retry=False)
    if message["status"] < 500:
        return Problem(message["status"], "invalid_request", text)
    return Problem(500, error["type"], text or error["type"], retry=False)
