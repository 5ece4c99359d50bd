"""A few seconds that calibrate the cost model: what the model, the codecs and the link take here, and the same figures on every rank.

    t(1)  a forward on one device          t(W)  one with 1/W of the tokens, each of which attends to all of them
    c/W + f = t(W),  c + f = t(1)          so  f = (W·t(W) − t(1)) / (W − 1)        what doesn't shrink: embeddings, adaLN, our own hooks
    packet                                 seconds = fixed + n · per element, through two sizes
    link                                   a gather of nothing gives its latency, one of some tens of milliseconds its bandwidth

All ranks measure at once, as they will compute at once; the slowest rank's figures are everyone's, since everyone waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from dite.models.access import the_denoiser
from dite.parallel.attention import Attention
from dite.parallel.codecs import codec
from dite.parallel.cost import CodecSpeed
from dite.parallel.families import attentions_of, family_of
from dite.parallel.group import RankGroup
from dite.parallel.hooks import Hooks
from dite.parallel.packet import HEADER_BYTES
from dite.parallel.sharding import Sharding, install
from dite.parallel.stream import Moment, Name, Predictor, ResidualStream
from dite.parallel.topology import bounds
from dite.parallel.workload import Link, Workload

CODECS = ("none", "int8", "int4", "int2", "int1")
FORWARDS = 3
FRAMES = 9  # of a stream that is timed: the first is a keyframe, and two in eight carry a digest
PINGS = 15
TRANSFER_S = 0.05
FIRST_TRANSFER_BYTES = 64 * 1024
MOST_TRANSFER_BYTES = 32 * 2**20


@torch.no_grad()
def measure(model: Any, inputs: Mapping[str, Any], group: RankGroup) -> tuple[Workload, Link, dict[str, CodecSpeed]]:
    """(workload, link, speeds) for `choice.choose` and `cost.predict`; all ranks of `group` must call it, with the same inputs, and get the same.

    `model`: a pipeline or its transformer, not shared out; `inputs`: keyword arguments of one of its calls, as the pipeline makes it (with all of the
    batch). Takes about 8 forwards and half a second. Raises UnsupportedModel for a model that dite can't share out, RankLost.
    """
    transformer = the_denoiser(model)
    facts = _forwards(transformer, inputs, group)
    mine = {
        "compute_s": facts.compute_s,
        "fixed_s": facts.fixed_s,
        "attention_share": facts.attention_s / facts.compute_s,
        "speeds": _codecs(facts, group.size),
    }
    mine |= dict(zip(("latency_s", "bandwidth"), link_speed(group), strict=True))
    everyone = group.gather_json(mine)
    slowest = max(everyone, key=lambda one: one["compute_s"])  # one rank's three figures, which belong together
    workload = Workload(
        name=type(transformer).__name__,
        layers=len(attentions_of(transformer, family_of(transformer))),
        tokens=facts.tokens,
        width=facts.width,
        heads=facts.heads,
        output_channels=facts.output[2],
        compute_s=slowest["compute_s"],
        batch=facts.output[0],
        value_bytes=facts.dtype.itemsize,
        attention_share=slowest["attention_share"],
        fixed_s=slowest["fixed_s"],
        output_tokens=facts.output[1],
        source=f"measured on {group.size} ranks",
    )
    link = Link("measured", min(one["bandwidth"] for one in everyone), max(one["latency_s"] for one in everyone))
    speeds = {name: CodecSpeed(*(max(one["speeds"][name][at] for one in everyone) for at in range(4))) for name in CODECS}
    return workload, link, speeds


def link_speed(group: RankGroup) -> tuple[float, float]:
    """(seconds of a message, bytes per second each way), while all ranks send at once."""
    latency_s = median(_timed(lambda: group.all_gather(torch.zeros(HEADER_BYTES, dtype=torch.uint8))) for _ in range(PINGS)) / (group.size - 1)
    size, bandwidth = FIRST_TRANSFER_BYTES, 0.0
    for _ in range(3):  # each is as long as the one before says that TRANSFER_S takes: a short one would measure buffers
        packet = torch.zeros(size, dtype=torch.uint8)
        took = median(_timed(lambda packet=packet: group.all_gather(packet)) for _ in range(2)) / (group.size - 1)
        bandwidth = size / max(took - latency_s, 1e-9)
        slowest = min(group.gather_json(bandwidth))
        size = int(min(max(slowest * TRANSFER_S, FIRST_TRANSFER_BYTES), MOST_TRANSFER_BYTES))
    return latency_s, bandwidth


@dataclass
class _Facts:
    """What some forwards tell. `output` [B, L, C] of the join; attention_s of one forward."""

    compute_s: float = 0.0
    fixed_s: float = 0.0
    attention_s: float = 0.0
    tokens: int = 0
    width: int = 0
    heads: int = 0
    dtype: torch.dtype = torch.float32
    output: tuple[int, int, int] = (0, 0, 0)
    parts: list[tuple[int, int]] = field(default_factory=list)


def _forwards(model: nn.Module, inputs: Mapping[str, Any], group: RankGroup) -> _Facts:
    facts = _Facts()

    def call() -> Any:
        return model(**inputs)

    facts.compute_s = _together(call, group)
    whole_s = _sharded(model, call, facts, 1, group)
    share_s = _sharded(model, call, facts, group.size, group)
    # With hooks and without: a plain forward is what one device does, ours is what ranks do.
    varying_s = max(0.0, whole_s - share_s) * group.size / (group.size - 1)
    facts.fixed_s = min(max(0.0, share_s - varying_s / group.size), facts.compute_s)
    return facts


def _sharded(model: nn.Module, call: Callable[[], Any], facts: _Facts, ranks: int, group: RankGroup) -> float:
    """Seconds of a forward with 1/`ranks` of the tokens, whose attention reads as many keys as the whole has."""

    def rows(count: int) -> tuple[int, int]:
        facts.parts = bounds(count, ranks)
        return facts.parts[0]

    def attend(layer: int, attention: Attention) -> torch.Tensor:
        begin = time.perf_counter()
        k, v = (attention.image_of(x).repeat(1, 1, ranks, 1) if ranks > 1 else attention.image_of(x) for x in (attention.k, attention.v))
        result = attention.over(k, v)
        if ranks == 1:
            facts.attention_s += time.perf_counter() - begin
            facts.heads, facts.tokens, facts.dtype = attention.q.shape[1], attention.q.shape[2], attention.q.dtype
            facts.width = facts.heads * attention.q.shape[3]
        return result

    def join(x: torch.Tensor) -> torch.Tensor:
        count = facts.parts[-1][1]
        facts.output = (len(x), count, x.shape[-1])
        return x if ranks == 1 else torch.cat([x, x.new_zeros(len(x), count - x.shape[1], x.shape[-1])], dim=1)

    hooks = Hooks()
    try:
        install(model, family_of(model), Sharding(rows, lambda: facts.parts[0][1], attend, join), hooks)
        seconds = _together(call, group)
        if ranks == 1:
            facts.attention_s /= FORWARDS + 1
    finally:
        hooks.undo()
    return seconds


def _together(call: Callable[[], Any], group: RankGroup) -> float:
    """The median of some calls, begun by all ranks at once, after one that warms up."""
    call()
    group.barrier()
    return median(_timed(call) for _ in range(FORWARDS))


def _codecs(facts: _Facts, ranks: int) -> dict[str, list[float]]:
    """[ns an element to encode, and to decode, seconds a packet to encode, and to decode] of a rank's packet and of a tenth of it."""
    batch, tokens = facts.output[0], max(1, facts.tokens // ranks)
    sizes = [tokens, max(1, tokens // 10)] if tokens > 1 else [1]
    found = {}
    for name in CODECS:
        times = [_stream_s(name, (batch, size, facts.width), facts.dtype) for size in sizes]
        elements = [batch * size * facts.width for size in sizes]
        if len(sizes) == 1:
            found[name] = [1e9 * times[0][0] / elements[0], 1e9 * times[0][1] / elements[0], 0.0, 0.0]
            continue
        slopes = [max(0.0, (times[0][way] - times[1][way]) / (elements[0] - elements[1])) for way in (0, 1)]
        fixed = [max(0.0, times[0][way] - slopes[way] * elements[0]) for way in (0, 1)]
        found[name] = [1e9 * slopes[0], 1e9 * slopes[1], *fixed]
    return found


def _stream_s(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    """Mean seconds to encode and to decode a packet of a stream, its header, checksum and digest included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    change = 0.05 * torch.randn(shape, generator=generator).to(dtype)
    stream = ResidualStream(Name(0, 0, 0), torch.zeros(shape, dtype=dtype), Predictor())
    chosen, encoding, decoding = codec(name), 0.0, 0.0
    for step in range(FRAMES):
        x, moment = x + change, Moment(0, 0, step)
        packet = torch.zeros(stream.packet_bytes(chosen), dtype=torch.uint8)
        begin = time.perf_counter()
        stream.encode(x, chosen, moment, packet)
        between = time.perf_counter()
        stream.decode_(packet, chosen, moment)
        if step:
            encoding, decoding = encoding + between - begin, decoding + time.perf_counter() - between
    return encoding / (FRAMES - 1), decoding / (FRAMES - 1)


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
