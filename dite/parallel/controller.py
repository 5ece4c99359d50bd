"""The rate controller: after every step, the codec of the next, from what the link and the image do. A pure state machine.

    room    = time budget − compute + overlap · compute              what a step leaves for the exchange
    fits    = the most bytes with  messages · latency + bytes / bandwidth ≤ room           (none fits: the fewest bytes)
    meets   = the fewest bytes with  relative error · change ≤ error bound                 (none meets it: the most bytes)
    target  = the larger of the two

So bits are spent as long as there is time for them, and where both can't be had **the error bound wins over the time budget**: a late image is
late, a bad one is wrong. A target above the codec in use is followed at once; one below it only after PATIENCE steps in a row that all lie below,
and then no further down than the highest of them.

Ranks must decide alike or they can't decode each other. All quantities are integers (bytes/s, ns, parts per billion), each rank's measurement is
all-reduced before anyone decides, and `Measurement.to_integers` is made for that: larger is worse in every place, so one MAX does it. Output then
depends on timing; `record()` gives the schedule that replays it exactly. (After DeCo-SGD, arXiv 2507.17346. It also warns that staleness amplifies
compression: give no codec below int4 as a candidate where the exchange is stale.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from dite.errors import UsageError
from dite.parallel.document import check_int, check_number
from dite.parallel.rates import parse_codec
from dite.parallel.schedule import Schedule

BILLION = 10**9
PATIENCE = 3  # steps


@dataclass(frozen=True)
class Measurement:
    """What one rank saw in a step, or the worst of all ranks. `change` is ‖Δ‖/‖x‖. Raises UsageError for what isn't finite: such a step needs a
    keyframe, not another codec, and NaN has no worst.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    compute_s: float
    change: float

    def __post_init__(self) -> None:
        check_number(self.bandwidth_bytes_per_s, 1.0, 1e15, "bandwidth_bytes_per_s")
        check_number(self.latency_s, 0.0, 1e6, "latency_s")
        check_number(self.compute_s, 0.0, 1e6, "compute_s")
        check_number(self.change, 0.0, 1e6, "change")

    def to_integers(self) -> tuple[int, int, int, int]:
        """(−bytes/s, ns, ns, parts per billion): fit for int64 and a MAX over ranks; larger is worse in each."""
        return (
            -int(self.bandwidth_bytes_per_s),
            round(self.latency_s * BILLION),
            round(self.compute_s * BILLION),
            round(self.change * BILLION),
        )

    @classmethod
    def from_integers(cls, values: Sequence[int]) -> Self:
        """The inverse of `to_integers`, after the all-reduce."""
        bandwidth, latency_ns, compute_ns, change_ppb = values
        return cls(float(-bandwidth), latency_ns / BILLION, compute_ns / BILLION, change_ppb / BILLION)


def worst(measurements: Sequence[Measurement]) -> tuple[int, int, int, int]:
    """The worst of each quantity over ranks, as integers; the order of ranks doesn't matter."""
    if not measurements:
        raise UsageError("nothing measured", "the controller needs the measurement of at least one rank")
    bandwidth, latency, compute, change = (max(column) for column in zip(*(one.to_integers() for one in measurements), strict=True))
    return bandwidth, latency, compute, change


@dataclass(frozen=True)
class Candidate:
    """A codec, the bytes a rank sends with it in a step (headers included), and its relative error ‖x − ref‖ / ‖Δ‖ (the root of a squared one)."""

    codec: str
    sent_bytes: int
    relative_error: float

    def __post_init__(self) -> None:
        parse_codec(self.codec)
        check_int(self.sent_bytes, 0, 10**15, f"the bytes of {self.codec}")
        check_number(self.relative_error, 0.0, 1e6, f"the error of {self.codec}")


@dataclass(frozen=True)
class Target:
    """`time_budget_s`: seconds that one step may take. `error_bound`: ‖error‖/‖x‖ that it may have. `messages`: latencies a step waits for (layers ×
    hops). `overlap`: the share of the compute behind which the exchange can hide, 0 to 1.
    """

    time_budget_s: float
    error_bound: float
    messages: int = 1
    overlap: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.time_budget_s, 0.0, 1e6, "time_budget_s")
        check_number(self.error_bound, 0.0, 1e6, "error_bound")
        check_int(self.messages, 0, 10**9, "messages")
        check_number(self.overlap, 0.0, 1.0, "overlap")


@dataclass(frozen=True)
class Decision:
    """The codec of a step, and what it was chosen between: `fits` the time budget, `meets` the error bound. Step 0's are just the start."""

    step: int
    codec: str
    fits: str
    meets: str


@dataclass
class RateController:
    """`update` once at the end of every step; `codec` is that of the next one. Candidates that send more and err no less than another are dropped.

    >>> candidates = [Candidate("int4", 1000, 0.1), Candidate("int8", 2000, 0.005)]
    >>> controller = RateController(candidates, Target(time_budget_s=3.0, error_bound=0.05))
    >>> controller.codec, controller.update([Measurement(1000.0, 0.0, 1.5, change=0.1)])
    ('int8', 'int8')
    """

    candidates: Sequence[Candidate]
    target: Target
    start: str | None = None  # codec before the first decision; None: that with the most bytes
    decisions: list[Decision] = field(init=False)

    def __post_init__(self) -> None:
        self.candidates = _undominated(self.candidates)
        names = [candidate.codec for candidate in self.candidates]
        if self.start is not None and self.start not in names:
            raise UsageError(f"can't start with {self.start}", f"the candidates worth their bytes are {', '.join(names)}")
        self._now = len(names) - 1 if self.start is None else names.index(self.start)
        self._below: list[int] = []  # the targets of the last steps in a row that lie below the codec in use
        self.decisions = [Decision(0, names[self._now], names[self._now], names[self._now])]

    @property
    def codec(self) -> str:
        """The codec of the step to come."""
        return self.decisions[-1].codec

    def update(self, measurements: Sequence[Measurement]) -> str:
        """Take in the measurements of a step, of every rank (or one, the worst of all, already reduced); returns the codec of the next step."""
        negative_bandwidth, latency_ns, compute_ns, change_ppb = worst(measurements)
        fits = self._most_that_fits(-negative_bandwidth, latency_ns, compute_ns)
        meets = self._least_that_meets(change_ppb)
        wanted = max(fits, meets)
        self._below = [*self._below, wanted] if wanted < self._now else []
        if wanted > self._now:
            self._now = wanted
        elif len(self._below) == PATIENCE:
            self._now, self._below = max(self._below), []
        name = [candidate.codec for candidate in self.candidates]
        self.decisions.append(Decision(len(self.decisions), name[self._now], name[fits], name[meets]))
        return self.codec

    def record(self, layers: int = 1) -> Schedule:
        """What was decided so far, as a schedule for `layers` layers: replayed, every step has the codec that it had."""
        return Schedule.from_table([[decision.codec] * layers for decision in self.decisions])

    def _most_that_fits(self, bandwidth: int, latency_ns: int, compute_ns: int) -> int:
        budget_ns = round(self.target.time_budget_s * BILLION)
        hidden_ns = round(self.target.overlap * BILLION) * compute_ns // BILLION
        room_ns = budget_ns - compute_ns + hidden_ns - self.target.messages * latency_ns
        # bytes / bandwidth ≤ room, without a division
        fitting = [place for place, one in enumerate(self.candidates) if one.sent_bytes * BILLION <= room_ns * bandwidth]
        return max(fitting, default=0)

    def _least_that_meets(self, change_ppb: int) -> int:
        bound = round(self.target.error_bound * BILLION) * BILLION
        meeting = [place for place, one in enumerate(self.candidates) if round(one.relative_error * BILLION) * change_ppb <= bound]
        return min(meeting, default=len(self.candidates) - 1)


def _undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """By rising bytes and falling errors."""
    names = [candidate.codec for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise UsageError("can't choose from these candidates", f"one or more are needed, each codec once; given: {', '.join(names) or 'none'}")
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.sent_bytes, one.relative_error, one.codec)):
        if not kept or candidate.relative_error < kept[-1].relative_error:
            kept.append(candidate)
    return tuple(kept)
