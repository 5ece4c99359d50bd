"""Exactly what a rank sends in a step, header bytes and all: the formulas that the counters of real exchanges must equal.

W ranks in the group, S tokens, C width, B samples, L layers, M patches; ⌈·⌉ rounds shares up, since all packets of a collective have one size. A
packet P(rows, columns) is a header (48 bytes), a β for each sample where the order is 2 (B bytes, to whole words), and the codec's payload, to whole
words.

    per layer    kv_gather, ring, displaced   (W−1) · 2 · P(B·⌈S/W⌉, C)                              K and V in one message, round the ring
                 ulysses                      (W−1) · 4 · P(B·⌈S/W⌉, C/W)                             Q, K, V to their heads; the output back
    per step     pipefusion                   M · P(B·⌈S/M⌉, C)                                      activations to the next stage
    output, raw  all but pipefusion           (W−1) · P(B·⌈S_out/W⌉, channels)                       everyone needs all of it for the next step
                 pipefusion                   the last rank sends (W−1) · P(B·S_out, channels) and no activations
                 CFG on two groups            + P(B·S_out, channels)                                 the other branch, B then being half the batch

The first step's packets are keyframes: int8, without β; raw where the codec is none. Where ranks send unlike amounts (uneven shares of tokens,
pipefusion) it is the one that sends most; patches of unlike sizes are counted as the largest. Agreement of ranks (a few bytes a step) isn't counted.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from dite.errors import UsageError, did_you_mean
from dite.parallel.document import check_int
from dite.parallel.rates import HEADER_BYTES, KEYFRAME_CODEC, parse_codec, payload_bytes
from dite.parallel.schedule import Schedule
from dite.parallel.topology import TOKEN_MODES
from dite.parallel.workload import Workload

ONE_DEVICE = "one_device"
GATHERED = ("kv_gather", "ring", "displaced")
MODES = (ONE_DEVICE, *TOKEN_MODES)


@dataclass(frozen=True)
class Layout:
    """How a forward is spread: `ranks` in all, on two CFG groups of half of them with `cfg`; pipefusion's `patches` (0: twice the ranks of a group).
    `one_device` with `cfg` and 2 ranks is CFG parallelism alone. `order`: of the residuals.
    """

    mode: str
    codec: str = "none"
    ranks: int = 1
    cfg: bool = False
    patches: int = 0
    header_bytes: int = HEADER_BYTES
    order: int = 2

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"no mode named {self.mode!r}", f"modes are {', '.join(MODES)}", did_you_mean(str(self.mode), MODES))
        parse_codec(self.codec)
        check_int(self.ranks, 1, 4096, "ranks")
        check_int(self.patches, 0, 4096, "patches")
        check_int(self.header_bytes, 0, 4096, "header_bytes")
        if self.cfg and self.ranks % 2:
            raise UsageError(f"CFG on two groups of {self.ranks} ranks", "the ranks must be even")
        if (self.mode == ONE_DEVICE) != (self.group == 1):
            size = f"a group of {self.group} rank{'s' if self.group > 1 else ''}"
            raise UsageError(f"{self.mode} on {size}", "one_device is for 1 rank a group, every other mode for 2 or more")

    @property
    def group(self) -> int:
        """Ranks that share a branch."""
        return self.ranks // 2 if self.cfg else self.ranks

    @property
    def slices(self) -> int:
        """Patches of a pipeline."""
        return self.patches or 2 * self.group

    def first(self) -> "Layout":
        """The layout with the codec of keyframes."""
        return self if self.codec == "none" else replace(self, codec=KEYFRAME_CODEC, order=0)

    def __str__(self) -> str:
        name = f"{self.mode} {self.codec}" if self.group > 1 else self.mode
        return f"{'CFG × ' if self.cfg else ''}{name} on {self.ranks} rank{'s' if self.ranks > 1 else ''}"


@dataclass(frozen=True)
class Packet:
    """A residual [rows, columns] of a layer: how many a rank sends, encodes and decodes (its own references included)."""

    rows: int
    columns: int
    sent: int
    encoded: int
    decoded: int


def check(workload: Workload, layout: Layout) -> None:
    """Raise UsageError, with the numbers, where the layout can't split the workload."""
    size = layout.group
    if layout.cfg:
        workload.one_branch()
    if layout.mode in (*GATHERED, "ulysses") and workload.outputs < size:
        raise UsageError(f"{layout.mode} on {size} ranks", f"there are only {workload.outputs} tokens to share out")
    if layout.mode == "ulysses" and workload.heads % size:
        fitting = [str(degree) for degree in range(1, workload.heads + 1) if workload.heads % degree == 0]
        raise UsageError(f"ulysses on {size} ranks", f"ulysses degree {size} must divide num_heads {workload.heads}", f"use {', '.join(fitting)}")
    if layout.mode == "pipefusion" and workload.layers < size:
        raise UsageError(f"pipefusion on {size} ranks", f"there are only {workload.layers} layers to share out")
    if layout.mode == "pipefusion" and workload.tokens < layout.slices:
        raise UsageError(f"pipefusion with {layout.slices} patches", f"there are only {workload.tokens} tokens")


@lru_cache(maxsize=1024)
def packets(workload: Workload, layout: Layout) -> tuple[Packet, ...]:
    """What a rank sends per layer (pipefusion: per step, from a stage to the next)."""
    check(workload, layout)
    if layout.cfg:
        workload = workload.one_branch()
    size = layout.group
    rows = workload.batch * -(-workload.tokens // size)
    if layout.mode in GATHERED:
        return (Packet(rows, workload.width, sent=2 * (size - 1), encoded=2, decoded=2 * size),)
    if layout.mode == "ulysses":
        return (Packet(rows, workload.width // size, sent=4 * (size - 1), encoded=4 * (size - 1), decoded=8 * (size - 1)),)
    if layout.mode == "pipefusion":
        patch = workload.batch * -(-workload.tokens // layout.slices)
        return (Packet(patch, workload.width, sent=layout.slices, encoded=layout.slices, decoded=2 * layout.slices),)
    return ()


def layer_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes that a rank sends for one layer (pipefusion: for one step), headers included."""
    batch = workload.batch // 2 if layout.cfg else workload.batch
    betas = _words(batch) if layout.order == 2 and layout.codec != "none" else 0
    sizes = ((one.sent, payload_bytes(layout.codec, one.rows, one.columns, workload.value_bytes)) for one in packets(workload, layout))
    return sum(sent * _words(layout.header_bytes + betas + payload) for sent, payload in sizes)


def exchange_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of activations that a rank sends in a step, headers included, output aside.

    >>> from dite.parallel.workload import WORKLOADS
    >>> [exchange_bytes(WORKLOADS["flux-1024"], Layout(mode, ranks=4, header_bytes=0)) // 10**6 for mode in ("kv_gather", "ulysses", "pipefusion")]
    [2420, 1210, 28]
    """
    return layer_bytes(workload, layout) * (1 if layout.mode == "pipefusion" else workload.layers)


def output_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the output that a rank sends in a step for its group: raw, since the sampler needs it exactly."""
    check(workload, layout)
    batch = workload.batch // 2 if layout.cfg else workload.batch
    tokens = workload.outputs if layout.mode == "pipefusion" else -(-workload.outputs // layout.group)
    share = batch * tokens * workload.output_channels * workload.value_bytes
    return (layout.group - 1) * _words(layout.header_bytes + share)


def branch_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes with which a rank tells its twin of the other CFG group the output of its own branch."""
    return _words(layout.header_bytes + workload.batch // 2 * workload.outputs * workload.output_channels * workload.value_bytes) if layout.cfg else 0


def step_bytes(workload: Workload, layout: Layout, first: bool = False) -> int:
    """All that the busiest rank sends in a step; `first`: the step of keyframes."""
    activations = exchange_bytes(workload, layout.first() if first else layout)
    output = output_bytes(workload, layout)
    # In a pipeline the last stage has no next one: it sends the output instead.
    shared = max(activations, output) if layout.mode == "pipefusion" else activations + output
    return shared + branch_bytes(workload, layout)


def bytes_per_image(workload: Workload, layout: Layout, steps: int, schedule: Schedule | None = None) -> int:
    """All that the busiest rank sends for an image of `steps` forwards, keyframes included. A `schedule` takes the place of the layout's codec."""
    check_int(steps, 1, 10**6, "steps")
    if schedule is None:
        return step_bytes(workload, layout, first=True) + (steps - 1) * step_bytes(workload, layout)
    if layout.mode == "pipefusion":
        raise UsageError("a schedule by layers for pipefusion", "it sends between stages, not in every layer", "give the layout a codec")
    schedule.check(steps, workload.layers)
    keyframe = step_bytes(workload, replace(layout, codec=KEYFRAME_CODEC), first=True)
    other = output_bytes(workload, layout) + branch_bytes(workload, layout)
    sizes = {codec: layer_bytes(workload, replace(layout, codec=codec)) for codec in _codecs(schedule)}
    cells = ((step, layer) for step in range(1, steps) for layer in range(workload.layers))
    return keyframe + (steps - 1) * other + sum(sizes[schedule.codec(step, layer)] for step, layer in cells)


def _words(size: int) -> int:
    """Up to whole 32-bit words: bodies are read as numbers of up to 4 bytes."""
    return -(-size // 4) * 4


def _codecs(schedule: Schedule) -> set[str]:
    """Every codec that a schedule may name."""
    return set(schedule.codecs) if schedule.table else {schedule.default, *(rule.codec for rule in schedule.rules)}
