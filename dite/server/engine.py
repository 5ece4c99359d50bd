"""Drawing several requests at once, each by the pipeline's own code, step by step together (continuous batching).

Every request runs the pipeline in a coroutine of its own (a greenlet), with its own scheduler. Where the pipeline calls its model, the coroutine
stops and hands its call over; once all have stopped, the calls are joined into one forward (dite.server.merge) and each coroutine goes on with its
rows of the result. So a request may begin at any step of the others, and have other steps, guidance or seed; nothing here knows a model family.

    request A   ─ prepare ─ call ┐        ┌ scheduler ─ call ┐        ┌ ...
    request B             ─ call ┼ forward┼ scheduler ─ call ┼ forward┼ decode ─ done
    request C                             └ prepare  ─ call  ┘        └ ...

All in one thread: torch's modes, thread pools and the exchange between ranks never see a second one. (Modes belong to the thread: `no_grad` entered
in one coroutine and left in another would leak, so every switch to one is made inside one of our own.) With ranks and a codec that remembers, each
request keeps streams of its own, and its calls aren't joined with others'.

An error in a call that ranks share takes all of them out of their group. `step` then stops half-way; whoever calls it lets the ranks meet again
(dite.server.agreement), and calls that were not made are made at the next step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from dite.errors import ExchangeCorrupted, RankLost, RanksDisagree
from dite.models.access import the_denoiser
from dite.sampling import Recorder, SampleSettings, call_parameters, draw
from dite.server.job import ImageRequest
from dite.server.logs import failure, log
from dite.server.merge import Call, alike, run

CONSEQUENCES = (RankLost, RanksDisagree, ExchangeCorrupted)  # of what happened on another rank, or to the exchange itself: no request's own fault


@dataclass(frozen=True)
class Stepped:
    """Request `name` has done `step` of its steps. `preview` are latents to show, where it was asked for them."""

    name: str
    step: int
    preview: torch.Tensor | None = None


@dataclass(frozen=True)
class Finished:
    """Images uint8 [n, 3, H, W]."""

    name: str
    images: torch.Tensor


@dataclass(frozen=True)
class Failed:
    """A request that gave no pictures."""

    name: str
    error: BaseException


Happened = Stepped | Finished | Failed


class _Slot:
    """One request under way. `call` is what its pipeline waits for."""

    def __init__(self, name: str, request: ImageRequest, pipe: Any, template: Any, started: Callable[[int], None]):
        self.name, self.request = name, request
        self.call: Call | None = None
        self.calls = 0  # that have been answered
        self.images: torch.Tensor | None = None
        self.recorder = Recorder(request.n, keep=False)
        self.reported = 0
        self._pipe = copy.copy(pipe)  # pipelines keep the guidance scale and the like in themselves
        vars(self._pipe)["scheduler"] = _announcing(copy.deepcopy(template), started)
        self.coroutine = greenlet(self._draw)

    def _draw(self) -> None:
        request = self.request
        known = call_parameters(self._pipe)
        extra: dict[str, Any] = {}
        if "height" in known:
            extra |= {"height": request.height_px, "width": request.width_px}
        if request.negative_prompt is not None:
            extra["negative_prompt"] = [request.negative_prompt] * request.n
        settings = SampleSettings(request.steps, request.guidance, request.n)
        self.images = draw(self._pipe, [request.condition] * request.n, request.seeds, settings, self.recorder, **extra)


class Engine:
    """Draws with `pipe` until `close`. `shared` is its handle when it is shared out over ranks: then all ranks must make the same calls alike."""

    def __init__(self, pipe: Any, *, micro_batch: int | None = None, shared: Any = None, scheduler: Any = None):
        self.pipe = pipe
        self.model = the_denoiser(pipe)
        self.micro_batch = micro_batch
        self.shared = shared if shared is not None and shared.topology.world > 1 else None
        # Ranks remember what they last exchanged, request by request; without a codec and in step there is nothing to remember.
        self.joins = self.shared is None or (self.shared.settings.codec == "none" and self.shared.topology.mode not in ("displaced", "pipefusion"))
        self.apart: set[str] = set()  # requests whose calls aren't joined with others': together, such a call has failed on all ranks
        self.lost: Exception | None = None  # why this rank has left its group, where that was no fault of a request known by name
        self._template = copy.deepcopy(pipe.scheduler) if scheduler is None else scheduler
        self._slots: dict[str, _Slot] = {}
        self._hub = getcurrent()
        self._running: _Slot | None = None
        self._own = vars(self.model).get("forward")
        self._forward = self.model.forward
        self._signature = inspect.signature(type(self.model).forward)
        self.model.forward = self._called

    def close(self) -> None:
        """Cancel everything and leave the pipeline as it was."""
        for name in list(self._slots):
            self.cancel(name)
        if self._own is None:
            vars(self.model).pop("forward", None)
        else:
            self.model.forward = self._own

    @property
    def interrupted(self) -> bool:
        """Whether this rank has left its group."""
        return self.shared is not None and self.shared.group.ended

    @property
    def at(self) -> dict[str, int]:
        """How many calls of each request under way have been made."""
        return {slot.name: slot.calls for slot in self._slots.values()}

    @property
    def names(self) -> list[str]:
        """Of the requests under way."""
        return list(self._slots)

    def start(self, name: str, request: ImageRequest) -> list[Happened]:
        """Begin a request, as far as its first call of the model."""
        slot = self._slots[name] = _Slot(name, request, self.pipe, self._template, self._begun)
        return self._go_on(slot, None)

    def cancel(self, name: str) -> None:
        """Forget a request; its pipeline unwinds from where it waits. Unknown names are ignored."""
        slot = self._slots.pop(name, None)
        if slot is None:
            return
        self._switch(slot, slot.coroutine.throw)
        self._forget(slot)

    def step(self) -> list[Happened]:
        """One call of the model for every request under way, or as far as an error in a shared one allows."""
        happened: list[Happened] = []
        waiting = list(self._slots.values())
        while waiting and not self.interrupted:
            together = [slot for slot in waiting if slot is waiting[0] or self._joined(slot, waiting[0])]
            waiting = [slot for slot in waiting if slot not in together]
            happened += self._answer(together)
        return happened

    def _joined(self, a: _Slot, b: _Slot) -> bool:
        return self.joins and not {a.name, b.name} & self.apart and alike(a.call, b.call)

    def joined_equals_alone(self, a: ImageRequest, b: ImageRequest) -> float:
        """Largest difference, relative to the largest value, between the results of two requests' calls made together and made alone."""
        for name, request in (("a", a), ("b", b)):
            self.start(name, request)
        calls = [slot.call for slot in self._slots.values()]
        try:
            if len(calls) < 2 or not alike(*calls):
                return float("inf")
            with torch.no_grad():
                pairs = list(zip(run(self._forward, calls), [run(self._forward, [call])[0] for call in calls], strict=True))
            return max(float((one[0] - other[0]).abs().max() / other[0].abs().max().clamp_min(1e-12)) for one, other in pairs)
        finally:
            for name in self.names:
                self.cancel(name)

    def _answer(self, slots: list[_Slot]) -> list[Happened]:
        """Make the calls of some requests as one, and let them go on."""
        try:
            results: list[Any] = self._run(slots)
        except Exception as error:
            if len(slots) > 1:  # one of them may be too large, or broken: the others shall not suffer for it
                log("joined_call_failed", calls=len(slots), **failure(error))
                if self.interrupted:
                    self.apart.update(slot.name for slot in slots)
                    self.lost = error.with_traceback(None)
                    return []
                return [event for slot in slots for event in self._answer([slot])]
            if self.interrupted and isinstance(error, CONSEQUENCES):
                self.lost = error.with_traceback(None)
                return []
            results = [error]
        return [event for slot, result in zip(slots, results, strict=True) for event in self._go_on(slot, result)]

    def _run(self, slots: list[_Slot]) -> list[Any]:
        with self._request(None if self.joins else slots[0]), torch.no_grad():
            if self.shared is not None and self.joins:
                self.shared.reset()
            part = nullcontext if self.shared is None else self.shared.part
            return run(self._forward, [slot.call for slot in slots], self.micro_batch, part)

    def _go_on(self, slot: _Slot, result: Any) -> list[Happened]:
        """Give a request its result, or throw its error, and let it run to its next call."""
        slot.call, slot.calls = None, slot.calls + (result is not None)
        try:
            if isinstance(result, BaseException):
                self._switch(slot, slot.coroutine.throw, type(result), result, result.__traceback__)
            else:
                self._switch(slot, slot.coroutine.switch, *([] if result is None else [result]))
        except Exception as error:
            self._slots.pop(slot.name, None)
            self._forget(slot)
            return [Failed(slot.name, error)]
        happened: list[Happened] = []
        if slot.recorder.steps > slot.reported:
            slot.reported = slot.recorder.steps
            happened.append(Stepped(slot.name, slot.reported, slot.recorder.preview[: slot.request.n] if slot.request.partial_images else None))
        if slot.coroutine.dead:
            self._slots.pop(slot.name)
            self._forget(slot)
            happened.append(Finished(slot.name, slot.images))
        return happened

    def _switch(self, slot: _Slot, switch: Callable[..., Any], *arguments: Any) -> None:
        before, self._running = self._running, slot
        try:
            with self._request(slot), torch.no_grad():
                switch(*arguments)
        finally:
            self._running = before

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. A pipeline that isn't ours gets what it always got."""
        slot = self._running
        if slot is None or getcurrent() is not slot.coroutine:
            return self._forward(*args, **kwargs)
        bound = self._signature.bind(self.model, *args, **kwargs)
        slot.call = Call.of({name: value for name, value in list(bound.arguments.items())[1:]})
        return self._hub.switch()

    def _request(self, slot: _Slot | None) -> Any:
        return nullcontext() if self.shared is None or slot is None else self.shared.request(slot.name)

    def _begun(self, steps: int) -> None:
        if self.shared is not None and not self.joins:
            self.shared.begin(steps)

    def _forget(self, slot: _Slot) -> None:
        self.apart.discard(slot.name)
        if self.shared is not None and not self.joins:
            self.shared.finish(slot.name)


def _announcing(scheduler: Any, started: Callable[[int], None]) -> Any:
    """A scheduler that tells when its timesteps are set."""
    set_timesteps = scheduler.set_timesteps

    def announced(*args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(*args, **kwargs)
        started(len(scheduler.timesteps))
        return result

    announced.__signature__ = inspect.signature(set_timesteps)  # pipelines read which arguments it takes
    scheduler.set_timesteps = announced
    return scheduler
