"""`codec="auto"`: after every step all ranks tell each other what they saw, and the rate controller chooses the next step's codec.

Off unless asked for, because the pictures then depend on how fast the link was. What was chosen can be replayed exactly: `par.schedule()`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from dite.parallel.controller import Candidate, Measurement, RateController, Target
from dite.parallel.group import RankGroup
from dite.parallel.rates import SQUARED_ERRORS
from dite.parallel.schedule import Schedule
from dite.parallel.stream import Moment, ResidualStream

START = "int4"
BITS = {"int8": 8.25, "int4": 4.25, "int2": 2.25, "int1": 1.25}  # a value, scales included
SLOWER = 1.25  # a step may take this much longer than its computing
ERROR_BOUND = 0.02  # ‖error‖/‖x‖ of keys and values
PINGS = 5
LEAST = 1e-9


class Adaptive:
    """One controller a request. `codec_of(step, layer)` is what has been decided; `after` decides on."""

    def __init__(self, group: RankGroup, layers: int):
        self.group = group
        self.layers = layers
        self._latency_s = self._ping()
        self._epoch = -1
        self._controller: RateController | None = None
        self._decisions = [START, START]
        self._before = (0, 0, 0.0, 0)

    def codec_of(self, step: int, layer: int) -> str:
        """The codec of a step, the same for all layers."""
        return self._decisions[min(step, len(self._decisions) - 1)]

    def schedule(self) -> Schedule:
        """What the last request was drawn with."""
        return Schedule.from_table([[name] * self.layers for name in self._decisions])

    def begin(self, moment: Moment) -> None:
        """Before a call of the model."""
        if moment.epoch != self._epoch:
            self._epoch, self._controller, self._decisions = moment.epoch, None, [START, START]
        traffic = self.group.traffic
        self._before = (traffic.sent, traffic.raw, traffic.seconds, traffic.exchanges)
        self._started = time.perf_counter()

    def after(self, moment: Moment, streams: Sequence[ResidualStream], value_bytes: int) -> None:
        """After a call: the first branch's calls decide for all branches of the next step."""
        if moment.branch:
            return
        traffic = self.group.traffic
        sent, raw, waited, exchanges = (now - before for now, before in zip(
            (traffic.sent, traffic.raw, traffic.seconds, traffic.exchanges), self._before, strict=True))  # fmt: skip
        compute_s = max(time.perf_counter() - self._started - waited, LEAST)
        transfer_s = max(waited - exchanges * self._latency_s, LEAST)
        seen = Measurement(max(1.0, min(sent / transfer_s, 1e15)), self._latency_s, compute_s, self._change(streams))
        mine = torch.tensor(seen.to_integers(), dtype=torch.int64)
        everyone = [Measurement.from_integers([int(value) for value in one]) for one in self.group.all_gather(mine)]
        if self._controller is None:
            slowest_s = max(one.compute_s for one in everyone)
            errors = SQUARED_ERRORS[2]
            candidates = [Candidate(name, int(raw * bits / 8 / value_bytes), math.sqrt(errors[name])) for name, bits in BITS.items()]
            # What one rank alone knows (its bytes) may differ by a token; rank 0's counts.
            sizes = torch.tensor([one.sent_bytes for one in candidates], dtype=torch.int64)
            self.group.broadcast(sizes, 0)
            candidates = [Candidate(one.codec, int(size), one.relative_error) for one, size in zip(candidates, sizes, strict=True)]
            self._controller = RateController(candidates, Target(SLOWER * slowest_s, ERROR_BOUND, exchanges), START)
            return
        self._decisions.append(self._controller.update(everyone))

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
