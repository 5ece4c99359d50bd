"""A rank's process: loads the model, draws what it is told to, and ends with its parent.

Ranks wait on their pipes, never inside an exchange. Before every step rank 0 tells the others which requests begin and which are called off, so that
all of them always make the same calls; only it answers. A request that fails in a call that ranks share is answered for, and they meet again
(dite.server.agreement); whatever else goes wrong between them ends the process, and the supervisor starts all of them anew.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dite.errors import DiteError
from dite.server.agreement import agreed, in_words, settle, told
from dite.server.card import ModelCard
from dite.server.frames import Channel
from dite.server.job import ImageRequest
from dite.server.logs import adopt, failure, log
from dite.server.settings import ServerSettings

if TYPE_CHECKING:
    from dite.server.engine import Engine, Happened

PLAN_BYTES = 4096
HEARTBEAT_S = 0.5
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Drawing:
    """A request under way."""

    request: ImageRequest
    began_s: float


class Rank:
    """One of `settings.nproc` processes; `number` is its place."""

    def __init__(self, channel: Channel, settings: ServerSettings, number: int):
        self.channel, self.settings, self.number = channel, settings, number
        self.waiting: dict[str, ImageRequest] = {}
        self.called_off: set[str] = set()
        self.drawing: dict[str, Drawing] = {}
        self.engine: Engine | None = None
        self.shared: Any = None

    def load(self) -> ModelCard:
        """Load, share out, warm up."""
        import torch

        # For this thread and for good: coroutines that enter `no_grad` and leave it in turns would else switch each other's gradients on, and a
        # decoder's graph takes several times its memory.
        torch.set_grad_enabled(False)
        from dite.models.load import load_pipeline
        from dite.sampling import unwrap
        from dite.server.describe import card, warm_up
        from dite.server.engine import Engine

        settings = self.settings
        pipe = unwrap(load_pipeline(settings.model, dtype=settings.dtype, device=settings.device))
        pipe.set_progress_bar_config(disable=True)
        scheduler = pipe.scheduler
        if settings.nproc > 1:
            from dite.parallel.handle import parallelize

            self.shared = parallelize(
                pipe, settings.nproc, settings.mode, _codec(settings.codec), order=settings.order, timeout_s=_patience_s(settings)
            )
        self.engine = Engine(pipe, micro_batch=settings.micro_batch, shared=self.shared, scheduler=_unwatched(scheduler))
        described = card(pipe, self.shared)
        return warm_up(self.engine, described, settings) if self._draws else described

    @property
    def _draws(self) -> bool:
        """Where ranks were asked for, but one device is faster (mode auto), the others have nothing to do."""
        return self.number == 0 or self._together

    @property
    def _together(self) -> bool:
        return self.shared is not None and self.shared.topology.world > 1

    def run(self) -> None:
        """Until the pipe is closed."""
        while True:
            self._read(wait=not self.drawing and not self.waiting)
            if not self._draws:
                self.waiting.clear()
                continue
            if self.waiting or self.drawing:
                self._turn()

    def _turn(self) -> None:
        """Begin and call off what rank 0 has decided, then one step of everything."""
        began, cancelled = self._plan()
        happened: list[Happened] = []
        started = time.perf_counter()
        for name in began:
            while name not in self.waiting:
                self._read(wait=True)
            request = self.waiting.pop(name)
            if name in cancelled:
                self._answer({"type": "ended", "job": name})
                continue
            self.drawing[name] = Drawing(request, time.perf_counter())
            happened += self.engine.start(name, request)
        for name in cancelled:
            if self.drawing.pop(name, None) is not None:
                self.engine.cancel(name)
                self._answer({"type": "ended", "job": name})
        pictures = sum(self.drawing[name].request.n for name in self.engine.names)
        happened += self.engine.step()
        if self._together and not agreed(self.shared.group, self.engine.at):
            happened = self._settle(happened)
        self._report(happened, pictures, time.perf_counter() - started)

    def _settle(self, happened: list[Happened]) -> list[Happened]:
        """After an error in a shared call: go on with all other ranks. Answers for requests that have failed; returns what happened to the others."""
        from dite.server.engine import Failed, Finished

        failed = {event.name: self._told(event) for event in happened if isinstance(event, Failed)}
        finished = [event.name for event in happened if isinstance(event, Finished)]
        happened[:] = [event for event in happened if not isinstance(event, Failed)]  # in place: an error keeps the memory that its call had
        verdict = settle(self.shared, self.engine, list(self.drawing), failed, finished)
        if self.number == 0:
            log("ranks_settled", failed=list(verdict.failed), begun_anew=verdict.again)
        for name, error in verdict.failed.items():
            self.engine.cancel(name)
            self._fail(name, error)
        if self.number:  # rank 0 has yet to deliver them
            for name in verdict.finished:
                self.engine.cancel(name)
                self.drawing.pop(name, None)
        kept = [event for event in happened if event.name in self.drawing and event.name not in verdict.again]
        for name in verdict.again:
            self.engine.cancel(name)
            kept += self.engine.start(name, self.drawing[name].request)
        self.engine.apart.update(name for name in verdict.apart if name in self.engine.names)
        return kept

    def _plan(self) -> tuple[list[str], list[str]]:
        if not self._together:
            began, cancelled = list(self.waiting), list(self.called_off)
            self.called_off.clear()
            return began, cancelled
        group = self.shared.group
        if self.number == 0:
            began, cancelled = list(self.waiting)[:16], list(self.called_off)[:16]
            self.called_off.difference_update(cancelled)
            text = json.dumps([began, cancelled]).encode()
            assert len(text) <= PLAN_BYTES, f"a plan of {len(text)} bytes"
            group.broadcast(group.bytes_of(text.ljust(PLAN_BYTES)), 0)
            return began, cancelled
        received = group.bytes_of(bytes(PLAN_BYTES))
        group.broadcast(received, 0)
        began, cancelled = json.loads(bytes(received.numpy()))
        return began, cancelled

    def _read(self, wait: bool) -> None:
        """Take what has come through the pipe; with `wait`, at least one message."""
        while (message := self.channel.receive(wait)) is not None:
            wait = False
            fields, _ = message
            if fields["type"] == "start":
                self.waiting[fields["job"]] = ImageRequest(**fields["request"])
            elif fields["type"] == "cancel":
                self.called_off.add(fields["job"])

    def _report(self, happened: list[Happened], pictures: int, seconds: float) -> None:
        from dite.server.engine import Failed, Finished, Stepped

        steps = {event.name: event.step for event in happened if isinstance(event, Stepped)}
        if steps:
            self._answer({"type": "steps", "steps": steps, "seconds": seconds, "pictures": pictures})
        for event in happened:
            if isinstance(event, Stepped):
                self._show(event)
            elif isinstance(event, Finished):
                self._deliver(event)
            else:
                assert isinstance(event, Failed)
                self._fail(event.name, self._told(event))

    def _show(self, event: Any) -> None:
        """Send partial pictures at evenly spread steps."""
        from dite.server.describe import preview

        request = self.drawing[event.name].request
        if self.number or event.preview is None or event.step not in _partial_steps(request):
            return
        with suppress(Exception):  # a decoder that has no memory for a preview may have it for the picture
            for index, picture in enumerate(preview(self.engine.pipe, event.preview, request.output_format)):
                self._answer({"type": "partial", "job": event.name, "index": index}, picture)

    def _deliver(self, event: Any) -> None:
        from dite.server.describe import encoded
        from dite.server.engine import Failed

        drawn = self.drawing.pop(event.name)
        if self.number:
            return
        try:
            pictures = encoded(event.images, drawn.request, self.settings)
        except Exception as error:  # a size that the format can't hold, say
            self._fail(event.name, self._told(Failed(event.name, error)))
            return
        seconds = time.perf_counter() - drawn.began_s
        self._answer({"type": "done", "job": event.name, "sizes": [len(one) for one in pictures], "seconds": seconds}, b"".join(pictures))

    def _told(self, event: Any) -> dict[str, Any]:
        """A failure as it is answered. Its place goes to the log, its words, which may quote a prompt, to its client alone."""
        if getattr(event.error, "http_status", 500) >= 500 and (self.number == 0 or self.engine.interrupted):
            log("draw_failed", job=event.name, rank=self.number, **failure(event.error))
        return told(event.error)

    def _fail(self, name: str, error: dict[str, Any]) -> None:
        self.drawing.pop(name, None)
        self._answer({"type": "failed", "job": name} | error)

    def _answer(self, message: dict[str, Any], raw: bytes = b"") -> None:
        if self.number == 0:
            self.channel.send(message, raw)

    def beat(self) -> None:
        """Tell every HEARTBEAT_S that this process runs, what memory it holds and what it has exchanged."""
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            with open("/proc/self/statm", encoding="ascii") as statm:
                memory = int(statm.read().split()[1]) * page
            traffic = getattr(getattr(self.shared, "group", None), "traffic", None)
            with suppress(OSError):
                self.channel.send(
                    {"type": "alive", "memory_bytes": memory, "sent": traffic.sent if traffic else 0, "raw": traffic.raw if traffic else 0}
                )
            time.sleep(HEARTBEAT_S)


def _partial_steps(request: ImageRequest) -> set[int]:
    """After which steps partial pictures are sent: evenly spread, the last step not among them."""
    return {round(request.steps * part / (request.partial_images + 1)) for part in range(1, request.partial_images + 1)} - {0, request.steps}


def _codec(name: str) -> Any:
    from pathlib import Path

    from dite.parallel.schedule import Schedule

    return Schedule.read(Path(name)) if name.endswith(".json") else name


def _patience_s(settings: ServerSettings) -> float:
    """How long an exchange may wait: a little less than the supervisor waits for a step, so that ranks say themselves whom they miss."""
    return max(1.0, 0.9 * settings.step_timeout_s)


def _unwatched(scheduler: Any) -> Any:
    """A copy of a scheduler without what `parallelize` has put on it: the engine says itself when a request begins."""
    import copy

    copied = copy.copy(scheduler)
    vars(copied).pop("set_timesteps", None)
    return copy.deepcopy(copied)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as the one that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """`python -m dite.server.rank FD PARENT`: serve the pipe FD."""
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's business
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    first = channel.receive(wait=True)
    assert first is not None
    settings = ServerSettings(**first[0]["settings"])
    rank = Rank(channel, settings, first[0]["rank"])
    threading.Thread(target=rank.beat, daemon=True).start()
    described = None
    try:
        described = rank.load()
        adopt("diffusers", "transformers")  # their warnings quote prompts: "the following part of your input was truncated"
        channel.send({"type": "ready", "card": described.to_json()})
        rank.run()
    except EOFError:
        pass
    except Exception as error:
        said = in_words(error)
        if not isinstance(error, DiteError):
            if described is None:
                traceback.print_exc()
            else:  # its words may be a client's
                said["what"] = said["type"]
                log("rank_failed", rank=rank.number, **failure(error))
        with suppress(OSError):
            channel.send({"type": "died", "error": said, "exit_code": getattr(error, "exit_code", 1)})
        os._exit(1)  # threads of an exchange may still wait for ranks that are gone
    os._exit(0)


if __name__ == "__main__":
    main()
