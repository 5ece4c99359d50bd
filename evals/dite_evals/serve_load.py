"""Load for a server: as fast as it answers (closed loop), or at a rate of our own whatever it answers (open loop, Poisson arrivals).

In an open loop a slow server can't slow its clients down, as in life; a closed one hides how long people would have waited.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dite_evals.serving import Answer, draw, percentile

Address = tuple[str, int]
Fields = Callable[[int], dict[str, Any]]  # of the i-th request


@dataclass(frozen=True)
class Load:
    """What clients saw. `seconds` is how long the load lasted, from the first request to the last reply."""

    answers: list[Answer]
    seconds: float
    steady: float = 0.0  # closed loops: pictures a second while all clients were busy, neither the first of each nor those after the end counted

    @property
    def served(self) -> list[Answer]:
        """Replies with pictures."""
        return [one for one in self.answers if one.status == 200]

    @property
    def refused(self) -> list[Answer]:
        """Replies that say to come back later."""
        return [one for one in self.answers if one.status == 429]

    def row(self) -> dict[str, Any]:
        """Counts, pictures a second, and percentiles of seconds."""
        served, refused = [one.seconds for one in self.served], [one.seconds for one in self.refused]
        return {
            "requests": len(self.answers),
            "served": len(served),
            "refused": len(refused),
            "other": len(self.answers) - len(served) - len(refused),
            "images_per_second": len(served) / self.seconds,
            "latency_s": _percentiles(served),
            "refusal_s": _percentiles(refused),
            "queue_s": _percentiles([one.json["dite"]["timings"]["queue_s"] for one in self.served]),
        }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    return {name: round(percentile(values, share), 4) for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))} if values else None


async def closed(address: Address, clients: int, seconds: float, fields: Fields) -> Load:
    """`clients` that each send their next request when the last one is answered, for so long."""
    began, answers, number = time.perf_counter(), [], 0

    done: list[float] = []

    async def client() -> None:
        nonlocal number
        while time.perf_counter() - began < seconds:
            number += 1
            answers.append(await draw(address, **fields(number)))
            done.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(clients)))
    busy = [at for at in sorted(done)[clients:] if at <= seconds]
    steady = (len(busy) - 1) / (busy[-1] - busy[0]) if len(busy) > 2 and busy[-1] > busy[0] else len(done) / done[-1]
    return Load(answers, time.perf_counter() - began, steady)


async def opened(address: Address, rate: float, seconds: float, fields: Fields, seed: int = 0) -> Load:
    """Requests at random moments, `rate` a second on average, for so long; then wait for all replies."""
    chance, began, tasks, at = random.Random(seed), time.perf_counter(), [], 0.0
    while at < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.create_task(draw(address, **fields(len(tasks)))))
        at += chance.expovariate(rate)
    answers = list(await asyncio.gather(*tasks))
    return Load(answers, time.perf_counter() - began)
