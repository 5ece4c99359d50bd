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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

READY_S = 120.0


@dataclass(frozen=True)
class Answer:
    """One reply: `status` 0 when the connection was closed without one, or the deadline passed."""

    status: int
    body: bytes
    seconds: float
    headers: dict[str, str] = field(default_factory=dict)

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


@contextmanager
def served(model: str, *flags: str, threads: int | None = None, deadline_s: float = READY_S) -> Iterator[Server]:
    """`dite serve MODEL FLAGS` on a free port, ready when entered, ended by SIGTERM (then SIGKILL) when left."""
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryDirectory(prefix="dite_served_") as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "dite", "serve", model, "--port", "0", "--json", *flags]
        began = time.monotonic()
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        try:
            yield Server(process, _url(process, log, deadline_s), log, time.monotonic() - began)
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
        with suppress(ValueError):
            return json.loads(text)["url"]
        time.sleep(0.02)
    raise RuntimeError(f"the server was not ready within {deadline_s:g} s; it said:\n{log.read_text(errors='replace')[-4000:]}")


def request_body(**fields: Any) -> dict[str, Any]:
    """A small request of the built-in model."""
    return {"prompt": "cat", "num_inference_steps": 20, "guidance_scale": 2.0, "seed": 0} | fields


async def draw(address: tuple[str, int], deadline_s: float = 120.0, **fields: Any) -> Answer:
    """POST one request for pictures."""
    return await call(address, "POST", "/v1/images/generations", request_body(**fields), deadline_s)


async def call(address: tuple[str, int], method: str, path: str, body: Any = None, deadline_s: float = 30.0) -> Answer:
    """One request on a connection of its own. Never raises for what a server or a network does: status 0 says that there was no reply."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(deadline_s):
            return await _call(address, method, path, body, began)
    except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
        return Answer(0, b"", time.perf_counter() - began)


async def _call(address: tuple[str, int], method: str, path: str, body: Any, began: float) -> Answer:
    async with connected(address) as (reader, writer):
        writer.write(head(method, path, None if body is None else json.dumps(body).encode()))
        await writer.drain()
        status, headers = await read_head(reader)
        length = headers.get("content-length")
        data = await reader.readexactly(int(length)) if length is not None else await _chunks(reader)
        return Answer(status, data, time.perf_counter() - began, headers)


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


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        data += (await reader.readexactly(size + 2))[:-2]
        if size == 0:
            return data


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
