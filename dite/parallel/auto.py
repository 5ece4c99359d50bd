"""`mode="auto"`: the mode, codec and degree that the cost model finds fastest here within an error bound; one device, when that is fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from dite.errors import DiteError, UnsupportedModel
from dite.models.families import example_inputs
from dite.parallel.checks import refuse, repeated
from dite.parallel.choice import Terms, choose
from dite.parallel.families import family_of
from dite.parallel.group import RankGroup
from dite.parallel.probe import measure
from dite.parallel.topology import Topology, parse
from dite.parallel.traffic import ONE_DEVICE, Layout

STEPS = 50
BRANCHES = 2  # with guidance, which nearly everyone uses
# Latent error at 20 steps, order 2 adaptive, of builtin:cifar10-dit, on 2 ranks (pipefusion and displaced: on 4); docs/results/exchange-quality.json.
ERRORS: Mapping[str, float] = MappingProxyType(
    {"int8": 1e-4, "int4": 1e-3, "int2": 6e-3, "int1": 0.032, "displaced:none": 0.046, "pipefusion:none": 0.037, "pipefusion:int4": 0.037}
)
ERROR_BOUND = 0.01


@dataclass(frozen=True)
class Decision:
    """What was chosen, in the words of `parallelize`, and why."""

    mode: str
    codec: str
    degree: int
    reason: str


def decide(model: nn.Module, group: RankGroup, error_bound: float = ERROR_BOUND) -> Decision:
    """Measure model, codecs and link on all ranks of `group`, which get the same answer: all ranks, or one device. Takes about ten forwards.

    Raises UnsupportedModel where dite can't make up inputs for the model, RankLost.
    """
    inputs = example_inputs(model)
    if inputs is None:
        raise UnsupportedModel(f"dite can't make up inputs for {type(model).__name__} to measure it with", "name a mode")
    batched = family_of(model).batched
    workload, link, speeds = measure(model, repeated(inputs, BRANCHES) if batched else inputs, group)
    choice = choose(workload, link, group.size, error_bound, ERRORS, Terms(STEPS, speeds, batched))
    single_s = choice.one_device_s
    for seconds, layout in choice.considered:
        found = _in_words(layout)
        if layout.mode == ONE_DEVICE and layout.ranks == 1:
            best = next(((time, one) for time, one in choice.considered if one.ranks == group.size), None)
            others = f"; of {group.size} ranks {best[1].mode} with {best[1].codec} would be fastest, {best[0]:.3g} s" if best else ""
            return Decision("kv_gather", "none", 1, f"one device is fastest: {single_s:.3g} s for {STEPS} steps{others}")
        if layout.ranks == group.size and _possible(model, found, layout):
            link_s = f"{link.bandwidth_bytes_per_s / 1e6:.3g} MB/s, {1e3 * link.latency_s:.3g} ms"
            reason = f"{found} with {layout.codec}: {seconds:.3g} s for {STEPS} steps, one device {single_s:.3g} s; the link has {link_s}"
            return Decision(found, layout.codec, group.size, reason)
    raise AssertionError("one device is always among what is considered")


def _in_words(layout: Layout) -> str:
    if layout.mode == ONE_DEVICE:
        return "cfg" if layout.cfg else "kv_gather"
    return f"cfg+{layout.mode}" if layout.cfg else layout.mode


def _possible(model: nn.Module, mode: str, layout: Layout) -> bool:
    try:
        topology: Topology = parse(mode, layout.ranks)
        refuse(model, topology, lambda step, layer: layout.codec)
    except DiteError:
        return False
    return True
