"""A request on its way to its pictures. It ends exactly once, in pictures or in a problem."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field

from dite.server.problems import Problem

ATTEMPTS = 2  # a job whose ranks died is drawn once more


@dataclass(frozen=True)
class ImageRequest:
    """What is to be drawn, checked, with nothing left open: drawn again, it gives the same pictures (to rounding, beside other requests; not so with
    codec auto, which follows the link). Picture i has seed `seed + i`."""

    condition: int | str  # a class id, or a prompt
    n: int
    seed: int
    steps: int
    guidance: float
    width_px: int
    height_px: int
    negative_prompt: str | None = None
    output_format: str = "png"
    partial_images: int = 0

    @property
    def cost(self) -> float:
        """Work, in rows of the model times steps times megapixels."""
        return self.n * self.steps * (2 if self.guidance > 1 else 1) * self.width_px * self.height_px / 1e6

    @property
    def seeds(self) -> list[int]:
        """One for each picture."""
        return [(self.seed + index) % 2**32 for index in range(self.n)]


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` is done."""

    step: int
    steps: int


@dataclass(frozen=True)
class Partial:
    """Picture `index` of the request, counting from 0, before it is finished; encoded."""

    index: int
    image: bytes


@dataclass(frozen=True)
class Pictures:
    """The end of a job: encoded pictures; how long it waited, how long the ranks had it (twice, if they died), and how long the last ones drew."""

    images: list[bytes]
    queue_s: float
    run_s: float
    attempts: int
    draw_s: float = 0.0


Event = Progress | Partial | Pictures | Problem
_numbers = itertools.count(1)


@dataclass(eq=False)
class Job:
    """Owned by the service; clients wait for `outcome()` or read `events()`.

    Attempts count up as ranks begin to draw it. `report` is called in the event loop's thread only.
    """

    request: ImageRequest
    arrived_s: float  # of the service's clock
    deadline_s: float
    id: str = ""
    attempts: int = 0
    started_s: float | None = None  # when it was first given to the ranks
    ended: Pictures | Problem | None = None
    _listeners: list[asyncio.Queue[Event]] = field(default_factory=list)
    _end: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self):
        self.id = self.id or f"job-{next(_numbers)}"

    def report(self, event: Event) -> None:
        """Tell whoever listens; the first `Pictures` or `Problem` ends the job, and nothing is reported after it."""
        if self.ended is not None:
            return
        if isinstance(event, Pictures | Problem):
            self.ended = event
            self._end.set()
        for listener in self._listeners:
            listener.put_nowait(event)

    async def outcome(self) -> Pictures:
        """Wait for the pictures. Raises Problem."""
        await self._end.wait()
        if isinstance(self.ended, Problem):
            raise self.ended
        assert isinstance(self.ended, Pictures)
        return self.ended

    def events(self) -> AsyncGenerator[Event, None]:
        """Everything from this call on, the last one being `Pictures` or `Problem`."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        if self.ended is None:
            self._listeners.append(queue)
        else:
            queue.put_nowait(self.ended)
        return self._heard(queue)

    async def _heard(self, queue: asyncio.Queue[Event]) -> AsyncGenerator[Event, None]:
        try:
            while True:
                event = await queue.get()
                yield event
                if isinstance(event, Pictures | Problem):
                    return
        finally:
            with suppress(ValueError):
                self._listeners.remove(queue)
