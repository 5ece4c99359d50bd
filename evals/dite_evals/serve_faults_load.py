"""A server's clients as the fault: too many of them, slow ones, and ones that leave. See dite_evals.serve_faults."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

from dite_evals.serve_load import opened
from dite_evals.serve_replies import Tally, rounded, verdict
from dite_evals.serving import PICTURES, Server, call, connected, draw, head, percentile, request_body, served, until

THREADS = 1  # of a rank
EXCESS = 4
STEPS, BATCH, QUEUE = 20, 8, 64
USUAL = ("--steps", str(STEPS), "--guidance", "2", "--max-batch", str(BATCH), "--max-queue", str(QUEUE))


async def overload(count: int, model: str) -> dict[str, Any]:
    """Four times as many requests as the server can draw, for `count` seconds, whatever it answers."""
    with served(model, *USUAL, threads=THREADS) as server:
        return await overload_of(server, count)


async def overload_of(server: Server, seconds: float, measured_s: float = 2.0) -> dict[str, Any]:
    """The same of a server with the settings USUAL; its capacity is measured for `measured_s` at least. With other settings, figures of speed mean
    little."""
    await draw(server.address, num_inference_steps=STEPS)
    before = await _capacity(server, max(measured_s, seconds / 5))
    running = asyncio.create_task(opened(server.address, EXCESS * before, seconds, lambda number: {"seed": number, "num_inference_steps": STEPS}))
    goodput = await _images_per_second(server, seconds, over=running.done)
    answers = (await running).answers
    after = await _capacity(server, max(measured_s, seconds / 5))
    tally = Tally()
    for answer in answers:
        tally.count(answer)
    admitted = [one.seconds for one in answers if one.status == 200]
    refused = [one.seconds for one in answers if one.status == 429]
    capacity = (before + after) / 2
    bound_s, admitted_s, refused_s = (QUEUE + 1) / capacity * 1.2, percentile(admitted, 0.99), percentile(refused or [0.0], 0.99)
    checks = {
        "nothing lost": not tally.lost,
        "nothing but pictures and 429": all(one.status in (200, 429) for one in answers),
        "admitted in time": admitted_s <= bound_s,
        "refused at once": refused_s <= 0.05,
        "goodput": goodput >= 0.9 * capacity,
    }
    return verdict(
        "admitted p99 ≤ (queue + 1) × service × 1.2, refusals p99 ≤ 50 ms, goodput ≥ 90% of capacity, 0 lost",
        len(answers),
        len(tally.lost),
        checks,
        **tally.row(),
        seconds=seconds,
        capacity_images_per_second={"before": rounded(before), "after": rounded(after)},
        offered_per_second=rounded(len(answers) / seconds),
        goodput_images_per_second=rounded(goodput),
        goodput_of_capacity=rounded(goodput / capacity),
        admitted_p99_s=rounded(admitted_s),
        admitted_bound_s=rounded(bound_s),
        refused_p50_s=rounded(percentile(refused or [0.0], 0.5)),
        refused_p99_s=rounded(refused_s),
    )


async def _capacity(server: Server, seconds: float) -> float:
    """Pictures a second while as many clients as it draws at once, and as many again, want their next one."""
    enough = asyncio.Event()

    async def client(seed: int) -> None:
        while not enough.is_set():
            await draw(server.address, seed=seed, num_inference_steps=STEPS)

    clients = [asyncio.create_task(client(seed)) for seed in range(2 * BATCH)]
    await _more(server, await _images(server))
    rate = await _images_per_second(server, seconds)
    enough.set()
    await asyncio.gather(*clients)
    return rate


async def _images_per_second(server: Server, seconds: float, over: Callable[[], bool] = lambda: False) -> float:
    """Over at least so many seconds, from one moment at which pictures were finished to another: a whole batch may end at once. When it is `over`,
    no more come."""
    first = await _more(server, await _images(server))
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    last = await _more(server, await _images(server), over)
    return (last - first) / (time.perf_counter() - began)


async def _more(server: Server, images: int, over: Callable[[], bool] = lambda: False) -> int:
    """Wait for more pictures than that; returns how many there are."""

    async def has_more() -> bool:
        return over() or await _images(server) > images

    await until(has_more, 120, every_s=0.02)
    return await _images(server)


async def _images(server: Server) -> int:
    return (await server.status())["images"]


ROUNDS, HEALTHY = 5, 40  # rounds, and requests of good clients in each half of one
SETTLED_S = 2.0


async def slow_sockets(count: int, model: str) -> dict[str, Any]:
    """`count` connections that trickle, say nothing or don't read, and come back when they are dropped; good clients beside them."""
    with served(model, *USUAL, threads=THREADS) as server:
        return await slow_sockets_of(server, count)


async def slow_sockets_of(server: Server, count: int, rounds: int = ROUNDS, healthy: int = HEALTHY) -> dict[str, Any]:
    """The same of one that runs. Rounds without and with slow clients take turns."""
    tally, alone, beside, dropped = Tally(), [], [], 0
    await _healthy(server, healthy // 4, Tally())
    for _ in range(rounds):
        alone.append(await _healthy(server, healthy, tally))
        async with Crowd(server, count) as crowd:
            await asyncio.sleep(SETTLED_S)
            beside.append(await _healthy(server, healthy, tally))
        dropped += crowd.dropped
        await asyncio.sleep(0.2)
    pooled = {name: list(chain.from_iterable(rounds)) for name, rounds in (("without", alone), ("with", beside))}
    ratios = [percentile(slow, 0.99) / percentile(quick, 0.99) for slow, quick in zip(beside, alone, strict=True)]
    ratio = statistics.median(ratios)
    checks = {"nothing lost": not tally.lost, "nothing refused": tally.outcomes.keys() <= {"pictures"}, "healthy as before": ratio <= 1.2}
    return verdict(
        "p99 of healthy clients ≤ 1.2 × without slow ones (median over rounds)",
        tally.requests,
        len(tally.lost),
        checks,
        **tally.row(),
        slow_sockets=count,
        dropped_and_come_back=dropped,
        healthy_p99_s={name: rounded(percentile(seconds, 0.99)) for name, seconds in pooled.items()},
        ratio_of_p99=rounded(ratio),
        ratios=[rounded(one) for one in ratios],
    )


async def _healthy(server: Server, count: int, tally: Tally) -> list[float]:
    """Seconds of `count` small requests, two at a time."""
    seconds: list[float] = []

    async def client() -> None:
        while len(seconds) < count:
            answer = await draw(server.address, num_inference_steps=4)
            tally.count(answer)
            seconds.append(answer.seconds)

    await asyncio.gather(client(), client())
    return seconds


class Crowd:
    """Slow clients for as long as a `with` lasts, a quarter of each kind."""

    def __init__(self, server: Server, count: int):
        self.server, self.count, self.dropped = server, count, 0

    async def __aenter__(self) -> Crowd:
        kinds = (self._headers, self._body, self._silent, self._deaf)
        self._tasks = [asyncio.create_task(self._again(kinds[number % len(kinds)])) for number in range(self.count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _again(self, kind: Any) -> None:
        while True:
            with suppress(OSError):
                await kind()
            self.dropped += 1
            await asyncio.sleep(0.1)

    async def _headers(self) -> None:
        await self._trickle(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")

    async def _body(self) -> None:
        await self._trickle(head("POST", PICTURES, b'{"prompt": "' + b"a" * 1000)[:-1000])

    async def _trickle(self, beginning: bytes) -> None:
        async with connected(self.server.address) as (reader, writer):
            writer.write(beginning)
            ended = asyncio.ensure_future(reader.read())
            while not (await asyncio.wait({ended}, timeout=1.0))[0]:
                writer.write(b"a")
                await writer.drain()
            await ended

    async def _silent(self) -> None:
        async with connected(self.server.address) as (reader, _):
            await reader.read()

    async def _deaf(self) -> None:
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.setblocking(False)
            await asyncio.get_running_loop().sock_connect(wire, self.server.address)
            await asyncio.get_running_loop().sock_sendall(wire, b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
            await asyncio.sleep(45.0)  # longer than the server waits for it


LEAVING_BATCH, LEAVING_CONNECTIONS = 4, 16
PERMITS = LEAVING_CONNECTIONS * 3 // 4  # what a server lets in at once, of so many connections
LEAVING = ("--max-batch", str(LEAVING_BATCH), "--set", f"limits.connections={LEAVING_CONNECTIONS}")
SLACK_S = 0.1


async def disconnects(count: int, model: str) -> dict[str, Any]:
    """`count` clients that leave: while they wait, while they are drawn, in the middle of a stream; politely, and not."""
    with served(model, *LEAVING, threads=THREADS) as server:
        return await disconnects_of(server, count)


async def disconnects_of(server: Server, count: int) -> dict[str, Any]:
    """The same of a server with the settings LEAVING."""
    await asyncio.gather(*(draw(server.address) for _ in range(LEAVING_BATCH)))
    files, late_s, back_s = _open_files(server), [], []
    for number in range(-(-count // (2 * LEAVING_BATCH))):
        back, step = await _leave_all(server, abruptly=bool(number % 2))
        back_s.append(back)
        late_s.append(back - step - SLACK_S)
    tally, most = Tally(), 0
    steps_before = await _steps_of_whole_batches(server)
    drawing = [asyncio.create_task(draw(server.address, seed=seed)) for seed in range(PERMITS)]
    while not all(task.done() for task in drawing):
        most = max(most, (await server.status())["running"])
        await asyncio.sleep(0.01)
    for task in drawing:
        tally.count(task.result())
    status, steps_after = await server.status(), await _steps_of_whole_batches(server)
    leaked = _open_files(server) - files
    checks = {
        "capacity back in time": max(late_s) <= 0,
        "no permit leaked": tally.outcomes == {"pictures": PERMITS},
        "a whole batch is drawn at once again": most == LEAVING_BATCH and steps_after > steps_before,
        "nothing runs or waits": status["running"] == 0 and status["queue"]["depth"] == 0,
        "no descriptor leaked": leaked <= 1,
        "no rank lost": status["restarts"] == 0,
    }
    gone = len(back_s) * 2 * LEAVING_BATCH
    failures = len(tally.lost) + max(0, PERMITS - tally.outcomes["pictures"])
    return verdict(
        "capacity back within a step and 100 ms, 0 permits or places leaked",
        gone,
        failures,
        checks,
        **tally.row(),
        disconnects=gone,
        leaked_descriptors=leaked,
        permits_free={"after": tally.outcomes["pictures"], "of": PERMITS},
        capacity_back_s={"p50": rounded(percentile(back_s, 0.5)), "p99": rounded(percentile(back_s, 0.99)), "most": rounded(max(back_s))},
        seconds_per_step=status["seconds_per_step"],
    )


async def _leave_all(server: Server, abruptly: bool) -> tuple[float, float]:
    """Fill the batch and the queue with clients, half of them streams, who then leave at once; seconds until nobody runs or waits, and of a step."""
    drawn = [await _enter(server, stream=bool(number % 2)) for number in range(LEAVING_BATCH)]
    await until(lambda: _holds(server, "running", LEAVING_BATCH), 30)
    queued = [await _enter(server, stream=bool(number % 2)) for number in range(LEAVING_BATCH)]
    await until(lambda: _holds(server, "waiting", LEAVING_BATCH), 30)
    for reader, _ in drawn[1::2]:
        await asyncio.wait_for(reader.readuntil(b"dite.progress"), 30)
    step_s = (await server.status())["seconds_per_step"]
    began = time.monotonic()
    for _, writer in (*queued, *drawn):
        if abruptly:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
    await until(lambda: _holds(server, "both", 0), 30, every_s=0.002)
    return time.monotonic() - began, step_s


async def _enter(server: Server, stream: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*server.address)
    body = request_body(num_inference_steps=250) | ({"stream": True, "progress": True} if stream else {})
    writer.write(head("POST", PICTURES, json.dumps(body).encode()))
    return reader, writer


async def _holds(server: Server, what: str, count: int) -> bool:
    status = await server.status()
    held = {"running": status["running"], "waiting": status["queue"]["depth"]}
    return (sum(held.values()) if what == "both" else held[what]) == count


async def _steps_of_whole_batches(server: Server) -> float:
    """How many steps were made of LEAVING_BATCH pictures, as Prometheus reads it."""
    text = (await call(server.address, "GET", "/metrics")).body.decode()
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("dite_batch_size_bucket")}
    below = f'dite_batch_size_bucket{{le="{LEAVING_BATCH / 2}"}}'
    return counts[f'dite_batch_size_bucket{{le="{float(LEAVING_BATCH)}"}}'] - counts[below]


def _open_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))
