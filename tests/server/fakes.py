"""A service that draws nothing, for tests of the HTTP layer, and a real uvicorn to put it behind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from dite.server.app import create_app
from dite.server.card import ModelCard
from dite.server.guard import guarded_protocol
from dite.server.job import Event, ImageRequest, Job, Pictures
from dite.server.metrics import Metrics
from dite.server.settings import ServerSettings

DEADLINE_S = 10.0
PATH = "/v1/images/generations"
CLASSES = {"airplane": 0, "cat": 3, "tabby cat": 3, "golden retriever": 7, "ship": 8}
CARD = ModelCard("DiTPipeline", reads_text=False, classes=CLASSES, class_ids=list(range(10)), default_size_px=(32, 32), most_steps=1000)
TEXT_CARD = ModelCard(
    "PixArtAlphaPipeline", reads_text=True, default_size_px=(512, 512), fixed_size=False, multiple_px=16, takes_negative_prompt=True, most_steps=1000
)


def settings(**changes: Any) -> ServerSettings:
    """Those of a model called "tiny"."""
    return ServerSettings(**{"model": "m", "name": "tiny"} | changes)


class FakeService:
    """Every job gets `script`, its events and pauses in seconds; `None` leaves it waiting, and a script without an end gets one picture for each
    asked for. `refusal` is raised by the next `submit`."""

    def __init__(self, card: ModelCard | None = CARD, **changes: Any):
        self.settings, self.card = settings(**changes), card
        self.metrics, self.state = Metrics(), "ready"
        self.script: list[Event | float] | None = []
        self.image = b"picture"
        self.refusal: Exception | None = None
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []
        self._playing: set[asyncio.Task] = set()

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def held(self) -> list[Job]:
        """Jobs that nobody has ended or cancelled."""
        return [job for job in self.jobs if job.ended is None and job not in self.cancelled]

    def status(self) -> dict[str, Any]:
        return {"state": self.state, "model": self.settings.served_name, "queue": {"depth": 0, "cost_s": 0.0}}

    def submit(self, request: ImageRequest, timeout_s: float | None = None) -> Job:
        if self.refusal is not None:
            raise self.refusal
        job = Job(request, arrived_s=0.0, deadline_s=timeout_s or 0.0)
        self.jobs.append(job)
        if self.script is not None:
            task = asyncio.get_running_loop().create_task(self._play(job, self.script))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)
        return job

    def cancel(self, job: Job) -> None:
        if job.ended is None:
            self.cancelled.append(job)

    async def _play(self, job: Job, script: list[Event | float]) -> None:
        await asyncio.sleep(0)
        for event in [*script, Pictures([self.image] * job.request.n, 0.25, 1.5, 1)]:
            if isinstance(event, int | float):
                await asyncio.sleep(event)
            else:
                job.report(event)


@dataclass
class Served:
    """A server that listens on 127.0.0.1:port."""

    port: int
    server: uvicorn.Server
    service: FakeService

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def dial(self, sent: bytes = b"", receive_buffer_bytes: int | None = None) -> socket.socket:
        """A connection of our own, on which `sent` has been sent."""
        wire = socket.socket()
        if receive_buffer_bytes:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        wire.settimeout(DEADLINE_S)
        wire.connect(("127.0.0.1", self.port))
        wire.sendall(sent)
        return wire


@contextmanager
def serving(service: FakeService) -> Iterator[Served]:
    """uvicorn in a thread, as `dite serve` runs it."""
    protocol = guarded_protocol(service.settings.limits, service.metrics)
    config = uvicorn.Config(create_app(service), http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Served(listening.getsockname()[1], server, service)
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = DEADLINE_S) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def request_bytes(body: Any = None, **headers: str) -> bytes:
    """A request for pictures as it goes over the wire."""
    text = json.dumps({"prompt": "cat"} if body is None else body).encode()
    fields = {"host": "localhost", "content-type": "application/json", "content-length": str(len(text))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + text


def answer_on(wire: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the next answer on a connection; not a byte more is read."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += (byte := wire.recv(1))
        assert byte, f"the server closed the connection after {head!r}"
    first, *lines = head.decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = b""
    while len(body) < int(headers["content-length"]):
        body += (piece := wire.recv(int(headers["content-length"]) - len(body)))
        assert piece, "the server closed the connection in the middle of an answer"
    return int(first.split()[1]), headers, json.loads(body)


def ended(wire: socket.socket) -> bool:
    """Whether the server closes the connection, having said nothing more."""
    try:
        return wire.recv(1) == b""
    except ConnectionResetError:
        return True


def counted(service: FakeService, status: int) -> float:
    """How many requests were answered with a status, as Prometheus reads it."""
    name = f'dite_requests_total{{code="{status}"}} '
    lines = service.metrics.render()[0].decode().splitlines()
    return float(next((line.removeprefix(name) for line in lines if line.startswith(name)), 0))


def is_problem(document: Any) -> bool:
    """Whether this is the one shape of our errors."""
    return document.keys() == {"error"} and document["error"].keys() == {"message", "type", "param", "code"} and bool(document["error"]["message"])
