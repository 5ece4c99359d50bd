"""The cost model: how long a step takes in every mode, on any link, before anyone buys the hardware.

W ranks a group, c = compute of one device without its fixed part f, A = its attention, T(b) = latency + b / bandwidth, L layers, M patches:

    mode         compute                   waits for the wire                            per
    one_device   f + c                     nothing
    kv_gather    f + c/W                   (W−1) · T(packet)                             layer
    ring         f + c/W                   (W−1) · max(0, T(packet) − A/(L·W·W))         layer   a hop hides behind the attention of the block held
    ulysses      f + c/W                   2 latencies + bytes / bandwidth               layer   two all-to-alls
    displaced    f + c/W                   max(T(packet), all of kv_gather − compute)    step    the output waits behind the last layer's packets
    pipefusion   (M+W−1) · (f + c/M)/W     (W−1) · t + (M−1) · max(0, t − (f + c/M)/W)   step    t = T(patch); filling the pipe hides nothing

The output travels raw and unhidden in every mode. The first step of `displaced` and `pipefusion` has no stale state yet: it is synchronous, and in a
pipeline serial. Encoding and decoding run on the device, unhidden, at the `speeds` given. Left out: contention between ranks on a shared switch,
jitter, TCP's slow start, and the pipe being refilled from step to step more cleverly than once a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dite.errors import UsageError
from dite.parallel.traffic import ONE_DEVICE, Layout, branch_bytes, exchange_bytes, output_bytes, packets, step_bytes
from dite.parallel.workload import Link, Workload


@dataclass(frozen=True)
class CodecSpeed:
    """Nanoseconds per element to encode, and to decode and add to the reference; and seconds that a packet takes besides, however small it is."""

    encode_ns: float
    decode_ns: float
    encode_s: float = 0.0
    decode_s: float = 0.0


NO_COST: Mapping[str, CodecSpeed] = MappingProxyType({})
# *Assumed*, not measured, for a card of about 800 GB/s: one pass that reads x and the reference and writes codes, or reads codes and updates the
# reference, moves 5 to 6 bytes an element.
ASSUMED_GPU_SPEEDS: Mapping[str, CodecSpeed] = MappingProxyType({codec: CodecSpeed(0.01, 0.01) for codec in ("int8", "int4", "int2", "int1")})


@dataclass(frozen=True)
class Prediction:
    """One step. seconds = compute_s + codec_s + exposed_s; exchange_s = hidden_s + exposed_s is all time on the wire; `sent_bytes` of the busiest
    rank, headers included. compute_s includes the bubbles of a pipeline.
    """

    seconds: float
    compute_s: float
    codec_s: float
    exchange_s: float
    hidden_s: float
    exposed_s: float
    sent_bytes: int


def predict(workload: Workload, link: Link, layout: Layout, first: bool = False, speeds: Mapping[str, CodecSpeed] = NO_COST) -> Prediction:
    """A step of `workload` in this layout over `link`; `first`: the step of keyframes. A codec that `speeds` lacks costs no time.

    Raises UsageError where the layout can't split the workload.
    """
    active = layout.first() if first else layout
    share = workload.one_branch() if layout.cfg else workload
    codec_s = _codec_seconds(workload, active, speeds)
    if layout.mode == "pipefusion":
        compute_s, exchange_s, hidden_s, codec_s = _pipeline(workload, share, link, active, (codec_s, first))
    else:
        compute_s = share.fixed_s + (share.compute_s - share.fixed_s) / layout.group
        exchange_s, hidden_s = _per_layer(workload, share, link, active)
        if layout.mode == "displaced" and not first:
            # The output is queued behind the last layer's packets, which nothing is left to hide.
            hidden_s = min(exchange_s * (1 - 1 / workload.layers), compute_s + codec_s)
    finish_s = _output_seconds(workload, link, layout)
    exchange_s += finish_s
    exposed_s = exchange_s - hidden_s
    return Prediction(compute_s + codec_s + exposed_s, compute_s, codec_s, exchange_s, hidden_s, exposed_s, step_bytes(workload, layout, first))


def image_seconds(workload: Workload, link: Link, layout: Layout, steps: int, speeds: Mapping[str, CodecSpeed] = NO_COST) -> float:
    """Seconds of an image: a step of keyframes and `steps` − 1 others."""
    if steps < 1:
        raise UsageError(f"an image of {steps} steps", "it takes at least one")
    return predict(workload, link, layout, True, speeds).seconds + (steps - 1) * predict(workload, link, layout, False, speeds).seconds


def _per_layer(workload: Workload, share: Workload, link: Link, layout: Layout) -> tuple[float, float]:
    """Seconds on the wire in all layers, and how many of them hide behind attention."""
    if layout.mode == ONE_DEVICE:
        return 0.0, 0.0
    sent = exchange_bytes(workload, layout) // workload.layers
    hops = layout.group - 1
    seconds = link.seconds(sent, messages=2 if layout.mode == "ulysses" else hops)
    if layout.mode != "ring":
        return workload.layers * seconds, 0.0
    block_s = share.attention_share * share.compute_s / (workload.layers * layout.group**2)
    return workload.layers * seconds, workload.layers * hops * min(seconds / hops, block_s)


def _pipeline(workload: Workload, share: Workload, link: Link, layout: Layout, costs: tuple[float, bool]) -> tuple[float, float, float, float]:
    """compute_s, exchange_s, hidden_s, codec_s of patches through stages. `costs`: codec seconds of a stage, and whether it is the first step."""
    stage_codec_s, first = costs
    stages, patches = layout.group, layout.slices
    patch_s = link.seconds(exchange_bytes(workload, layout) // patches)
    varying_s = share.compute_s - share.fixed_s
    if first:  # every token needs fresh K and V of all others, so a stage waits for all patches of the one before
        return share.compute_s, (stages - 1) * patches * patch_s, 0.0, stages * stage_codec_s
    turns = patches + stages - 1
    patch_compute_s = (share.fixed_s + varying_s / patches) / stages  # each patch is a call of its own, whose fixed part the stages share
    turn_s = patch_compute_s + stage_codec_s / patches
    return turns * patch_compute_s, turns * patch_s - patch_s, (patches - 1) * min(patch_s, turn_s), turns * stage_codec_s / patches


def _output_seconds(workload: Workload, link: Link, layout: Layout) -> float:
    """The output's gather or broadcast within a group, and its exchange between CFG groups."""
    seconds = 0.0
    if layout.group > 1:
        # A broadcast only sends: half duplex doesn't halve it.
        sent = output_bytes(workload, layout)
        alone = layout.mode == "pipefusion"
        seconds += link.latency_s + sent / link.bandwidth_bytes_per_s if alone else link.seconds(sent, messages=layout.group - 1)
    return seconds + (link.seconds(branch_bytes(workload, layout)) if layout.cfg else 0.0)


def _codec_seconds(workload: Workload, layout: Layout, speeds: Mapping[str, CodecSpeed]) -> float:
    """Of one rank (of one stage) in a step."""
    speed = speeds.get(layout.codec)
    if speed is None:
        return 0.0
    times = 1 if layout.mode == "pipefusion" else workload.layers
    seconds = 0.0
    for one in packets(workload, layout):
        elements = one.rows * one.columns
        decoded = one.decoded // 2 if layout.codec == "none" and layout.mode in ("ulysses", "pipefusion") else one.decoded  # no own reference there
        seconds += one.encoded * (elements * speed.encode_ns * 1e-9 + speed.encode_s) + decoded * (elements * speed.decode_ns * 1e-9 + speed.decode_s)
    return times * seconds
