"""`codec="auto"`: after every step all ranks tell each other what they saw, and the rate controller chooses the next step's codec.

Off unless asked for, because the pictures then depend on how fast the link was. What was chosen can be replayed exactly: `par.schedule()`.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dite.parallel.codecs import codec
from dite.parallel.controller import Candidate, Measurement, RateController, Target
from dite.parallel.group import RankGroup
from dite.parallel.rates import HEADER_BYTES, KEYFRAME_CODEC, SQUARED_ERRORS
from dite.parallel.schedule import Schedule
from dite.parallel.stream import Moment, ResidualStream

START = "int4"
CODECS = ("int8", "int4", "int2", "int1")
SLOWER = 1.25  # a step may take this much longer than its computing
ERROR_BOUND = 0.02  # ‖error‖/‖x‖ of keys and values
PINGS = 5
LEAST = 1e-9
MOST_REQUESTS = 256


@dataclass
class _Request:
    """What was decided for one request: the codec of every step so far and of the next."""

    decisions: list[str] = field(default_factory=lambda: [START, START])
    controller: RateController | None = None


class Adaptive:
    """One controller a request. `codec_of(step, layer)` is what has been decided; `after` decides on."""

    def __init__(self, group: RankGroup, layers: int):
        self.group = group
        self.layers = layers
        self._latency_s = self._ping()
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._request = _Request()
        self._before = (0, 0.0, 0)
        self._started = 0.0

    def codec_of(self, step: int, layer: int) -> str:
        """The codec of a step, the same for all layers."""
        return self._request.decisions[min(step, len(self._request.decisions) - 1)]

    def schedule(self) -> Schedule:
        """What the last request was drawn with."""
        return Schedule.from_table([[name] * self.layers for name in self._request.decisions])

    def begin(self, moment: Moment) -> None:
        """Before a call of the model."""
        self._request = self._requests.setdefault(moment.epoch, _Request())
        while len(self._requests) > MOST_REQUESTS:
            self._requests.popitem(last=False)
        traffic = self.group.traffic
        self._before = (traffic.sent, traffic.seconds, traffic.exchanges)
        self._started = time.perf_counter()

    def after(self, moment: Moment, streams: Sequence[ResidualStream]) -> None:
        """After a call: the first branch's calls decide for all branches of the next step."""
        if moment.branch:
            return
        traffic = self.group.traffic
        now = (traffic.sent, traffic.seconds, traffic.exchanges)
        sent, waited, exchanges = (after - before for after, before in zip(now, self._before, strict=True))
        compute_s = max(time.perf_counter() - self._started - waited, LEAST)
        transfer_s = max(waited - exchanges * self._latency_s, LEAST)
        seen = Measurement(max(1.0, min(sent / transfer_s, 1e15)), self._latency_s, compute_s, self._change(streams))
        mine = torch.tensor(seen.to_integers(), dtype=torch.int64)
        everyone = [Measurement.from_integers([int(value) for value in one]) for one in self.group.all_gather(mine)]
        if self._request.controller is None:
            target = Target(SLOWER * max(one.compute_s for one in everyone), ERROR_BOUND, exchanges)
            self._request.controller = RateController(self._candidates(sent, streams), target, START)
            return
        self._request.decisions.append(self._request.controller.update(everyone))

    def _candidates(self, sent: int, streams: Sequence[ResidualStream]) -> list[Candidate]:
        """What a step would send with each codec, from what its keyframes took; rank 0's figures are everyone's."""
        sizes = {name: sum(HEADER_BYTES + codec(name).body_bytes(tuple(one.value.shape), one.value.dtype) for one in streams) for name in CODECS}
        told = torch.tensor([sent * sizes[name] // max(1, sizes[KEYFRAME_CODEC]) for name in CODECS], dtype=torch.int64)
        self.group.broadcast(told, 0)
        return [Candidate(name, int(size), math.sqrt(SQUARED_ERRORS[2][name])) for name, size in zip(CODECS, told, strict=True)]

    def _change(self, streams: Sequence[ResidualStream]) -> float:
        """‖Δ‖/‖x‖ of what was decoded last, over a few streams."""
        picked = [stream for stream in streams if stream.reference.delta is not None][:: max(1, len(streams) // 8)]
        delta = sum(float(stream.reference.delta.float().square().sum()) for stream in picked)
        value = sum(float(stream.value.float().square().sum()) for stream in picked)
        return math.sqrt(delta / value) if value > 0 and math.isfinite(delta / value) else 0.0

    def _ping(self) -> float:
        """Seconds of an exchange of nothing."""
        times = []
        for _ in range(PINGS):
            started = time.perf_counter()
            self.group.barrier()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]
