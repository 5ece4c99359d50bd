"""A server for tests of its page: the real HTTP layer, and behind it a service without ranks. A test holds the steps and decides what goes wrong."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from dite.server.app import create_app
from dite.server.card import ModelCard
from dite.server.job import ImageRequest, Job, Partial, Pictures, Progress
from dite.server.metrics import Metrics
from dite.server.problems import Problem
from dite.server.settings import ServerSettings

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DEADLINE_S = 20.0


def card(**changes: Any) -> ModelCard:
    """That of the built-in model, changed."""
    found = {"pipeline": "DiTPipeline", "reads_text": False, "classes": {name: at for at, name in enumerate(CIFAR)}, "class_ids": list(range(10))}
    return ModelCard(**found | {"default_size_px": (32, 32), "parameters": 9_600_000, "backend": "int8"} | changes)


def text_card() -> ModelCard:
    """That of a model that reads text and draws several sizes, shared out over two ranks."""
    sizes = {"default_size_px": (512, 512), "fixed_size": False, "multiple_px": 16}
    words = {"pipeline": "PixArtAlphaPipeline", "reads_text": True, "classes": {}, "class_ids": [], "takes_negative_prompt": True}
    return card(**words, **sizes, exchange={"ranks": 2, "mode": "kv_gather", "codec": "int4"})


def png(seed: int, width_px: int, height_px: int, clear: float = 1.0) -> bytes:
    """A picture of 16×16 squares that depends on `seed`: a hill of colour, under noise as long as `clear` is below 1."""
    noise = seed * 2654435761 % 2**32
    rows = []
    for y in range(16):
        row = []
        for x in range(16):
            near = 1 - ((x - seed * 7 % 16) ** 2 + (y - seed * 13 % 16) ** 2) ** 0.5 / 10
            noise = (noise * 1664525 + 1013904223) % 2**32
            hill = [80 + 6 * y + 110 * near * (1, 0.4, -0.8)[(channel + seed) % 3] for channel in range(3)]
            row.append(bytes(min(255, max(0, int(clear * value + (1 - clear) * (noise >> 8 * at & 255)))) for at, value in enumerate(hill)))
        rows.append(b"\0" + b"".join(row[16 * x // width_px] for x in range(width_px)))
    pixels = zlib.compress(b"".join(rows[16 * y // height_px] for y in range(height_px)))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@dataclass
class PageServer:
    """Listens from `start` to `stop`, and may do so again, on the same port. Steps pass freely or, once `held`, one for each `allow.release()`.

    `refusal` is what the next request is answered; `failure` ends each drawing half way.
    """

    card: ModelCard | None = field(default_factory=card)
    name: str = "builtin:cifar10-dit"
    state: str = "ready"
    api_key: str | None = None
    steps: int = 8
    waiting: int = 0
    ranks: int = 1
    held: bool = False
    refusal: Problem | None = None
    failure: Problem | None = None
    asked: list[ImageRequest] = field(default_factory=list)
    polls: int = 0
    images: int = 0
    port: int = 0

    def __post_init__(self):
        self.allow = threading.Semaphore(0)
        self.left = threading.Event()  # a client hung up in the middle of its drawing
        self.metrics = Metrics()
        self._drawing: dict[Job, asyncio.Task] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    def start(self) -> PageServer:
        """Listen, in a thread."""
        self.settings = ServerSettings(model="m", name=self.name, api_key=self.api_key, steps=self.steps)
        config = uvicorn.Config(create_app(self), ws="none", lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=0)
        self._server = uvicorn.Server(config)
        listening = self._listening(time.monotonic() + 20)
        self.port = listening.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        return self

    def _listening(self, deadline: float) -> socket.socket:
        """Between two starts somebody's connection may have been given the port for a while."""
        while True:
            try:
                return socket.create_server(("127.0.0.1", self.port))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def stop(self) -> None:
        """Close the port, and every connection."""
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def submit(self, request: ImageRequest, timeout_s: float | None = None) -> Job:
        self.asked.append(request)
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal
        job = Job(request, arrived_s=0.0, deadline_s=DEADLINE_S)
        self._drawing[job] = asyncio.get_running_loop().create_task(self._draw(job))
        return job

    def cancel(self, job: Job) -> None:
        if job.ended is None:
            self.left.set()
            self._drawing[job].cancel()
        self._drawing.pop(job, None)

    def status(self) -> dict[str, Any]:
        self.polls += 1
        ranks = [{"rank": at, "pid": 4100 + at, "memory_bytes": 320 * 2**20, "alive": self.is_ready or at == 0} for at in range(self.ranks)]
        work = {"queue": {"depth": self.waiting, "cost_s": 2.5 * self.waiting}, "running": len(self._drawing), "images": self.images}
        return {"state": self.state, "model": self.name, "ranks": ranks, **work, "restarts": 0, "seconds_per_step": 0.043, "uptime_s": 11520.0}

    async def _draw(self, job: Job) -> None:
        asked = job.request
        size = (asked.width_px, asked.height_px)
        for step in range(1, asked.steps + 1):
            await self._step()
            job.report(Progress(step, asked.steps))
            if self.failure is not None and 2 * step >= asked.steps:
                return job.report(self.failure)
            if step in (asked.steps // 3, 2 * asked.steps // 3):
                for index, seed in enumerate(asked.seeds):
                    job.report(Partial(index, png(seed, *size, clear=step / asked.steps)))
        self.images += asked.n
        job.report(Pictures([png(seed, *size) for seed in asked.seeds], queue_s=0.0124, run_s=2.3412, attempts=1))

    async def _step(self) -> None:
        """Wait for leave to make a step, or for a moment."""
        deadline = time.monotonic() + DEADLINE_S
        await asyncio.sleep(0.005)
        while self.held and not self.allow.acquire(blocking=False):
            assert time.monotonic() < deadline, "nobody lets this drawing go on"
            await asyncio.sleep(0.005)
