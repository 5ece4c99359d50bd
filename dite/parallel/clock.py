"""Which request, guidance branch and step a call of the model belongs to: the key of everything that is remembered between steps.

A pipeline says where a request begins by calling `scheduler.set_timesteps`; a bare model's begins when the timestep goes up again. A branch is what
the pipeline names in `cache_context`; else calls with one timestep are the branches of one step. Where one call is made in several parts (by a server
with a fixed number of rows), each part of a branch has references of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from dite.errors import UsageError
from dite.parallel.stream import Moment

MOST_BRANCHES = 8
MOST_REQUESTS = 256
EPOCHS = 2**32
STEPS = 2**16
WIDE = 0.1  # of a request's first timestep


@dataclass
class _Request:
    epoch: int
    steps: dict[int, int] = field(default_factory=dict)
    branches: dict[str, int] = field(default_factory=dict)
    timestep: float | None = None
    first: float | None = None
    calls: int = 0


class Clock:
    """Counts calls. All ranks call it alike, so that they agree without a word."""

    def __init__(self):
        self._contexts: dict[str, str | None] = {}
        self.told = False  # whether someone calls `restart` at each request's beginning
        self.name = ""  # the current request's
        self.part: int | None = None  # which part of a call the next one is; parts come in order, and belong to the call that part 0 is
        self._epochs = 0
        self._requests: OrderedDict[str, _Request] = OrderedDict()

    @property
    def context(self) -> str | None:
        """The guidance branch that the current request's pipeline has named."""
        return self._contexts.get(self.name)

    @context.setter
    def context(self, branch: str | None) -> None:
        self._contexts[self.name] = branch

    def restart(self) -> None:
        """The current request begins (again)."""
        self._epochs = (self._epochs + 1) % EPOCHS
        self._requests[self.name] = _Request(self._epochs)
        self._requests.move_to_end(self.name)
        while len(self._requests) > MOST_REQUESTS:
            self._requests.popitem(last=False)

    def switch(self, name: str) -> str:
        """Calls belong to request `name` from now on; returns the previous name."""
        before, self.name = self.name, name
        return before

    def finish(self, name: str) -> None:
        """Forget a request."""
        self._requests.pop(name, None)
        self._contexts.pop(name, None)

    def names(self) -> set[str]:
        """Of all requests that are remembered."""
        return set(self._requests)

    def epochs(self) -> set[int]:
        """The same by their numbers."""
        return {request.epoch for request in self._requests.values()}

    def epoch(self, name: str) -> int | None:
        """Of the request of that name."""
        request = self._requests.get(name)
        return None if request is None else request.epoch

    @property
    def latest(self) -> int:
        """The last epoch that was given to a request. It may be set, to a later one: then all ranks count on from the same."""
        return self._epochs

    @latest.setter
    def latest(self, epoch: int) -> None:
        self._epochs = epoch

    def tick(self, timestep: float, inputs: int = 0) -> Moment:
        """The moment of a call with this timestep."""
        request = self._requests.get(self.name)
        if request is None or not self.part:
            request = self._called(request, timestep)
        key = f"call {request.calls}" if self.context is None else f"context {self.context}"
        if self.part is not None:
            key += f" part {self.part}"
        branch = request.branches.setdefault(key, len(request.branches))
        step = request.steps.get(branch, -1) + 1
        request.steps[branch] = step
        return Moment(request.epoch, branch, step, inputs)

    def _called(self, request: _Request | None, timestep: float) -> _Request:
        """Count a call, or the first part of one, of the current request; it may be the first of another."""
        over = request is not None and (request.calls >= MOST_BRANCHES or max(request.steps.values(), default=0) >= STEPS - 1)
        if over and self.told and self.context is None and timestep == request.timestep:
            rule = f"of calls with one timestep, {MOST_BRANCHES} are told apart as branches; with more, one would get another's references"
            raise UsageError("the model was called too often at one step", rule, "name each call in model.cache_context(name), or use one device")
        # Also where the pipeline says when a request begins: its scheduler may have been exchanged for one that nobody watches.
        # Small steps back are a second-order sampler's.
        margin = WIDE * (request.first or 0.0) if request is not None and self.told else 0.0
        backwards = request is not None and request.timestep is not None and timestep > request.timestep + margin
        if request is None or over or backwards:
            self.restart()
            request = self._requests[self.name]
        request.calls = request.calls + 1 if timestep == request.timestep else 1
        request.timestep = timestep
        request.first = timestep if request.first is None else request.first
        return request
