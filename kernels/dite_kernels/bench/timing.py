"""Timing on machines that are never quite idle: what is compared is timed side by side, again and again.

    a round   every candidate, the baseline among them, once, in shuffled order
    ratio     median over rounds of (baseline's time ÷ own time), both of the same round: above 1 is faster

A disturbance that lasts longer than a round slows both sides of its ratios alike, and one that is shorter spoils a few ratios, which the median
leaves out. Minima and means of separate runs have neither property.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]  # the seconds that one call takes
Progress = Callable[[str, int, int], None]  # what, done, total

FLUSH_BYTES = 512 * 2**20  # several times the largest L2
MOST_ROUNDS = 500
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Budget:
    """Exactly `rounds`; or as many as fit into `seconds` of measured time, from LEAST_ROUNDS to MOST_ROUNDS of them."""

    rounds: int | None = None
    seconds: float = 20.0

    def is_spent(self, rounds: int, seconds: float) -> bool:
        if self.rounds is not None:
            return rounds >= self.rounds
        return rounds >= MOST_ROUNDS or (rounds >= LEAST_ROUNDS and seconds >= self.seconds)


@dataclass(frozen=True)
class Timing:
    """Percentiles of one candidate's times, in µs, and its ratio to the baseline."""

    p20_us: float
    p50_us: float
    p80_us: float
    ratio: float

    @property
    def us(self) -> dict[str, float]:
        return {"p20": self.p20_us, "p50": self.p50_us, "p80": self.p80_us}


def interleave(calls: Mapping[str, Call], baseline: str, budget: Budget, clock: Clock, seed: int = 0) -> dict[str, Timing]:
    """Time every call of `calls`, of which `baseline` is one. Warm them up first."""
    order, draw = list(calls), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds, spent = 0, 0.0
    while not budget.is_spent(rounds, spent):
        draw.shuffle(order)
        for name in order:
            took = clock(calls[name])
            seconds[name].append(took)
            spent += took
        rounds += 1
    return {name: summary(own, seconds[baseline]) for name, own in seconds.items()}


def summary(own: list[float], baseline: list[float]) -> Timing:
    """Seconds of the same rounds, in order, as a Timing.

    >>> summary([2.0, 4.0, 1.0], [4.0, 4.0, 4.0]).ratio
    2.0
    """
    times = torch.tensor(own, dtype=torch.float64, device="cpu")
    others = torch.tensor(baseline, dtype=torch.float64, device="cpu")
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, device="cpu")
    return Timing(*(1e6 * times.quantile(at)).tolist(), float((others / times).quantile(0.5)))


def wall_clock(device: torch.device) -> Clock:
    """What a caller waits for: the CPU's work, launches, and the GPU's."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def clock(call: Call) -> float:
        wait()
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin

    return clock


def kernel_clock(device: torch.device) -> Clock:
    """What a kernel takes. On CUDA: between two events, from a cold L2, and with launches hidden behind the flush (about 0.15 ms of it): inside a
    model the weights are cold too, and launches overlap. On a CPU it is the wall clock."""
    if device.type != "cuda":
        return wall_clock(device)
    cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def clock(call: Call) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            cache.zero_()
            begin.record()
            call()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def _nothing() -> None:
    pass
