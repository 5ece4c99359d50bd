"""The rank processes of one start: all live, or all are killed.

A rank is missed as soon as its pipe closes; one that stands still is missed when its heartbeat, or the step it computes, is overdue. Ranks are
leaders of their own sessions, so that a terminal's signals don't reach them, and the kernel kills them when this process is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dite.errors import RankLost
from dite.parallel.launch import RENDEZVOUS, threads_per_rank
from dite.server import frames
from dite.server.card import ModelCard
from dite.server.logs import failure, log
from dite.server.settings import ServerSettings

WATCH_S = 0.1
OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # an operator's; the kernel's too, when there is no memory
KILL_S = 10.0

OnMessage = Callable[[int, frames.Message, bytes], None]


@dataclass
class Process:
    """One rank: its process, its pipe, and when it was last heard."""

    number: int
    popen: subprocess.Popen
    writer: asyncio.StreamWriter
    heard_s: float
    memory_bytes: int = 0
    card: ModelCard | None = None


class RanksLost(Exception):
    """Why the ranks of this start are no more. `error` is what a rank said of it, as DiteError.to_dict gives it. `own`: a rank ended by what it did
    (an error, a crash, a step without end), and not from outside (killed, stopped, or because another one was)."""

    def __init__(self, reason: str, error: dict[str, str] | None = None, exit_code: int = 1, own: bool = False):
        super().__init__(reason)
        self.reason, self.error, self.exit_code, self.own = reason, error, exit_code, own


class Ranks:
    """Start with `start`, wait for their end with `lost`, and always `kill` them in the end."""

    def __init__(self, settings: ServerSettings, on_message: OnMessage):
        self.settings = settings
        self.processes: list[Process] = []
        self.step_due_s: float | None = None  # when the step under way has to be done; set by the service, which knows whether there is one
        self._on_message = on_message
        self._folder = tempfile.TemporaryDirectory(prefix="dite_serve_")
        self._lost: asyncio.Future[RanksLost] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task] = []
        self._ready = asyncio.Event()

    async def start(self) -> ModelCard:
        """Start all ranks and wait until they are warm. Raises RanksLost."""
        settings = self.settings.model_dump(mode="json", exclude={"api_key", "host", "port", "hosts"})
        for number in range(self.settings.nproc):
            try:
                process, reader = await self._spawn(number)
            except OSError as error:
                raise RanksLost(f"rank {number} could not be started: {error.strerror or error}") from error
            self.processes.append(process)
            self._tasks.append(asyncio.create_task(self._listen(process, reader)))
            self._send(process, frames.pack({"type": "configure", "settings": settings, "rank": number}))
        self._tasks.append(asyncio.create_task(self._watch()))
        ready = asyncio.create_task(self._ready.wait())
        done, _ = await asyncio.wait({ready, self._lost}, timeout=self.settings.startup_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            ready.cancel()
            raise self._lost.result()
        if not done:
            ready.cancel()
            raise RanksLost(f"the ranks were not ready after {self.settings.startup_timeout_s:g} s")
        assert self.processes[0].card is not None
        return self.processes[0].card

    async def lost(self) -> RanksLost:
        """Wait until a rank is no more."""
        return await asyncio.shield(self._lost)

    def send(self, message: frames.Message, to: int | None = None) -> None:
        """Send a message to every rank, or to one."""
        data = frames.pack(message)
        for process in self.processes:
            if to in (None, process.number):
                self._send(process, data)

    async def kill(self) -> None:
        """Kill what is left of them, and wait until it is gone."""
        for task in self._tasks:
            task.cancel()
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)  # also what a rank may have started itself
            process.writer.close()
        for process in self.processes:
            await asyncio.to_thread(process.popen.wait, KILL_S)
        self._folder.cleanup()

    async def _spawn(self, number: int) -> tuple[Process, asyncio.StreamReader]:
        ours, theirs = socket.socketpair()
        environment = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads_per_rank(self.settings.nproc))} | os.environ
        if self.settings.nproc > 1:
            world = {"RANK": str(number), "WORLD_SIZE": str(self.settings.nproc), "LOCAL_RANK": str(number)}
            environment |= world | {RENDEZVOUS: str(Path(self._folder.name) / "ranks")}
        command = [sys.executable, "-P", "-m", "dite.server.rank", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            popen = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), pass_fds=[theirs.fileno()], start_new_session=True
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=2**20)
        return Process(number, popen, writer, time.monotonic()), reader

    def _send(self, process: Process, data: bytes) -> None:
        if not process.writer.is_closing():
            process.writer.write(data)

    async def _listen(self, process: Process, reader: asyncio.StreamReader) -> None:
        """Hand on what a rank says, until its pipe closes."""
        said: RanksLost | None = None
        try:
            while (message := await frames.read(reader)) is not None:
                fields, raw = message
                process.heard_s = time.monotonic()
                if fields["type"] == "ready":
                    process.card = ModelCard.from_json(fields["card"])
                    if all(one.card for one in self.processes) and len(self.processes) == self.settings.nproc:
                        self._ready.set()
                elif fields["type"] == "died":
                    own = fields["error"]["type"] != RankLost.__name__
                    said = RanksLost(f"rank {process.number}: {fields['error']['what']}", fields["error"], fields["exit_code"], own)
                else:
                    if fields["type"] == "alive":
                        process.memory_bytes = fields["memory_bytes"]
                    self._on_message(process.number, fields, raw)
        except frames.BadFrame as error:
            said = RanksLost(f"rank {process.number} sent what can't be read: {error}")
        except Exception as error:  # a mistake of ours: better to start anew than to go on deaf
            log("mistake", rank=process.number, **failure(error))
            said = RanksLost(f"what rank {process.number} said could not be used: {type(error).__name__}")
        if said is None:
            how, own = _how(process.popen)
            said = RanksLost(f"rank {process.number} ended{how}", own=own)
        self._lose(said)

    async def _watch(self) -> None:
        """Miss ranks that stand still. This process may have stood still itself: then nobody is blamed for that time."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            pause = now - before - WATCH_S
            before = now
            if pause > 1.0:
                for process in self.processes:
                    process.heard_s += pause
                self.step_due_s = None if self.step_due_s is None else self.step_due_s + pause
            for process in self.processes:
                limit = self.settings.heartbeat_timeout_s if process.card else self.settings.startup_timeout_s
                if now - process.heard_s > limit:
                    self._lose(RanksLost(f"rank {process.number} has said nothing for {limit:g} s"))
            if self.step_due_s is not None and now > self.step_due_s:
                self._lose(RanksLost(f"a step was not done within {self.settings.step_timeout_s:g} s", own=True))

    def _lose(self, reason: RanksLost) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)

    def facts(self) -> list[dict[str, Any]]:
        """Number, process id, memory and life of each rank."""
        return [
            {"rank": one.number, "pid": one.popen.pid, "memory_bytes": one.memory_bytes, "alive": one.popen.poll() is None} for one in self.processes
        ]


def _how(popen: subprocess.Popen) -> tuple[str, bool]:
    """How a process ended, as far as that is known already, and whether it did so by itself."""
    with suppress(subprocess.TimeoutExpired):
        code = popen.wait(0.2)
        if code < 0:
            return f" by signal {signal.Signals(-code).name}", -code not in OUTSIDE
        return f" with exit code {code}", True
    return "", False
