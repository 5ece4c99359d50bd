"""A real `dite serve` in a process of its own, and a light client for it: what the measurements and fault injections of the server share.

The client is plain asyncio, about 0.2 ms a request: on a machine whose cores the model keeps busy, a comfortable one would measure itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

READY_S = 300.0  # on a busy machine; a quiet one takes a few seconds
PICTURES = "/v1/images/generations"


class Cut(ValueError):
    """A reply that ended before it was complete."""


UNANSWERED = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ValueError)


@dataclass(frozen=True)
class Answer:
    """One reply: `status` 0 when the connection was closed without one, or the deadline passed; `begun` then says whether some of one had come."""

    status: int
    body: bytes
    seconds: float
    headers: dict[str, str] = field(default_factory=dict)
    begun: bool = True

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen
    url: str
    log: Path
    ready_s: float  # from start to ready

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    def logged(self) -> list[dict[str, Any]]:
        """Its JSON log so far."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = []
        for line in lines:
            with suppress(ValueError):
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict)]

    async def status(self) -> dict[str, Any]:
        """GET /v1/status."""
        return (await call(self.address, "GET", "/v1/status")).json

    async def rank_pids(self) -> list[int]:
        """Process ids of the ranks."""
        return [rank["pid"] for rank in (await self.status())["ranks"]]

    async def is_ready(self) -> bool:
        """Whether GET /ready says so."""
        return (await call(self.address, "GET", "/ready")).status == 200


@contextmanager
def served(model: str, *flags: str, threads: int | None = None, deadline_s: float = READY_S) -> Iterator[Server]:
    """`dite serve MODEL FLAGS` on a free port, ready when entered, ended by SIGTERM (then SIGKILL) when left."""
    began = time.monotonic()
    with launched(model, *flags, threads=threads) as (process, log):
        yield Server(process, _url(process, log, deadline_s), log, time.monotonic() - began)


@contextmanager
def launched(model: str, *flags: str, threads: int | None = None) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The same, not waited for: its process, and the file it logs to."""
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryDirectory(prefix="dite_served_") as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "dite", "serve", model, "--port", "0", "--json", *flags]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        try:
            with process.stdout:
                yield process, log
        finally:
            end(process)


def end(process: subprocess.Popen, patience_s: float = 20.0) -> int:
    """SIGTERM, then SIGKILL; returns the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    if process.poll() is None:
        process.kill()
    return process.wait(10)


def _url(process: subprocess.Popen, log: Path, deadline_s: float) -> str:
    """What the server prints when it is ready."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    text, deadline = b"", time.monotonic() + deadline_s
    while time.monotonic() < deadline and process.poll() is None:
        text += process.stdout.read() or b""
        with suppress(ValueError, KeyError):  # half of it, or an error
            return json.loads(text)["url"]
        time.sleep(0.02)
    raise RuntimeError(f"the server was not ready within {deadline_s:g} s; it said:\n{log.read_text(errors='replace')[-4000:]}")


def request_body(**fields: Any) -> dict[str, Any]:
    """A small request of a model with classes."""
    return {"prompt": "class:3", "num_inference_steps": 20, "guidance_scale": 2.0, "seed": 0} | fields


async def draw(address: tuple[str, int], deadline_s: float = 120.0, **fields: Any) -> Answer:
    """POST one request for pictures."""
    return await call(address, "POST", PICTURES, request_body(**fields), deadline_s)


async def call(address: tuple[str, int], method: str, path: str, body: Any = None, deadline_s: float = 30.0) -> Answer:
    """One request on a connection of its own. Never raises for what a server or a network does: status 0 says that there was no reply."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(deadline_s):
            return await _call(address, method, path, body, began)
    except UNANSWERED as error:
        return Answer(0, b"", time.perf_counter() - began, begun=isinstance(error, Cut))


async def follow(address: tuple[str, int], told: Callable[[dict[str, Any]], None], deadline_s: float = 120.0, **fields: Any) -> Answer:
    """POST one request for pictures as a stream; `told` gets every event's document as it comes. The answer's body is all of the stream."""
    began = time.perf_counter()
    body = request_body(**{"stream": True, "progress": True} | fields)

    def heard(event: bytes) -> None:
        for line in event.splitlines():
            if line.startswith(b"data: "):
                told(json.loads(line[6:]))

    try:
        async with asyncio.timeout(deadline_s):
            return await _call(address, "POST", PICTURES, body, began, heard)
    except UNANSWERED as error:
        return Answer(0, b"", time.perf_counter() - began, begun=isinstance(error, Cut))


async def _call(
    address: tuple[str, int], method: str, path: str, body: Any, began: float, heard: Callable[[bytes], None] = lambda event: None
) -> Answer:
    async with connected(address) as (reader, writer):
        writer.write(head(method, path, None if body is None else json.dumps(body).encode()))
        await writer.drain()
        status, headers = await read_head(reader)
        try:
            data = await read_rest(reader, headers, heard)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            raise Cut from error
        return Answer(status, data, time.perf_counter() - began, headers)


async def read_rest(reader: asyncio.StreamReader, headers: dict[str, str], heard: Callable[[bytes], None] = lambda event: None) -> bytes:
    """The body of a reply; of one in chunks, `heard` gets every event as it comes."""
    if (length := headers.get("content-length")) is not None:
        return await reader.readexactly(int(length))
    data, told = b"", 0
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        data += (await reader.readexactly(size + 2))[:-2]
        while (end := data.find(b"\n\n", told)) >= 0:
            heard(data[told:end])
            told = end + 2
        if size == 0:
            return data


@asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end."""
    reader, writer = await asyncio.open_connection(*address, limit=2**24)
    try:
        yield reader, writer
    finally:
        writer.close()


def head(method: str, path: str, body: bytes | None = None) -> bytes:
    """A whole request as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of a reply."""
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    return int(first.split()[1]), {name.lower(): value for name, value in headers.items()}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of all are not above.

    >>> percentile([3, 1, 2, 4], 0.5), percentile([1, 2], 0.99)
    (2, 2)
    """
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1e6) * len(ordered) // 10**6) - 1)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and only waits to be reaped doesn't."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children(pid: int) -> list[int]:
    """Running processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == pid and state not in "ZX":
                found.append(int(entry.name))
    return found


async def until(condition: Callable[[], Any], deadline_s: float, every_s: float = 0.005) -> float:
    """Wait until `condition()`, or what it awaits, is true; returns how long that took. Raises TimeoutError."""
    began = time.monotonic()
    while True:
        result = condition()
        if await result if asyncio.iscoroutine(result) else result:
            return time.monotonic() - began
        if time.monotonic() - began > deadline_s:
            raise TimeoutError(f"not within {deadline_s:g} s")
        await asyncio.sleep(every_s)
