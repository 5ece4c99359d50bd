"""What codecs are called, how many bytes each sends, and what each gets wrong.

    name        payload of a residual [rows, columns], in bytes
    none        rows · columns · (bytes of a value)
    intB        rows · ceil(columns / 64) · (8·B + 2)                  groups of 64 along a row, a last short group filled up, fp16 scales
    lowrank-R   2 · R · (rows + columns)                               two fp16 factors; R at most the smaller side
    topk-K      4 · rows · max(1, floor(columns / K))                  the largest of each row: fp16 values and 16-bit places

intB is exact (`dite_kernels.codec` is the reference). Packet headers aren't counted here.

Errors are squared and relative to ‖Δ‖², the squared change of the activation since the step before, of what receivers hold *in the closed loop*: with
the error of the last step fed back. That is no property of a codec alone: it grows with how coarse the codec is (feedback) and falls with how well
the reference predicts (order). Measure your own with `closed_loop_error`.
"""

import re
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

from dite.errors import UsageError, did_you_mean

GROUP = 64
SCALE_BYTES = 2
HEADER_BYTES = 48  # of a packet
BITS = MappingProxyType({"none": 0, "int8": 8, "int4": 4, "int2": 2, "int1": 1})  # none: the bits of the value itself
NUMBERED = MappingProxyType({"lowrank": (1, 128), "topk": (2, 65536)})  # kind → the least and the most that may follow
KEYFRAME_CODEC = "int8"  # of the first exchange of a stream, when there is no reference yet

# Of a trained latent DiT (K and V, 50 steps, guidance 4), where ‖Δ‖ is 6.0% of ‖x‖: (error / 0.060)². Order 2 has momentum 0.5; its int8 was not
# measured apart, and is taken to be that of order 1. Low rank and topk have no figures here: measure them.
SQUARED_ERRORS = MappingProxyType(
    {
        1: MappingProxyType({"none": 0.0, "int8": 2.5e-5, "int4": 0.0100, "int2": 0.267, "int1": 2.10}),
        2: MappingProxyType({"none": 0.0, "int8": 2.5e-5, "int4": 0.0072, "int2": 0.111, "int1": 0.667}),
    }
)


def parse_codec(name: Any) -> tuple[str, int]:
    """Kind and number of a codec: ("int4", 0), ("lowrank", 8), ("topk", 32). Raises UsageError for any other name.

    >>> parse_codec("topk-32")
    ('topk', 32)
    """
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is no codec", f"a codec is a string: {_known()}")
    if name in BITS:
        return name, 0
    kind, _, number = name.partition("-")
    if kind not in NUMBERED:
        raise UsageError(f"no codec named {name!r}", f"codecs are {_known()}", did_you_mean(name, [*BITS, *NUMBERED]))
    least, most = NUMBERED[kind]
    # One name for one codec: no signs, no leading zeros, ASCII digits only (int() takes them all).
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or not least <= int(number) <= most:
        raise UsageError(f"no codec named {name!r}", f"{kind} takes an integer from {least} to {most}, as in {kind}-8")
    return kind, int(number)


def payload_bytes(codec: str, rows: int, columns: int, value_bytes: int = 2) -> int:
    """Bytes that a residual [rows, columns] takes on the wire, its header aside; `value_bytes` is the size of a raw value.

    >>> payload_bytes("int4", 1, 64), payload_bytes("int4", 2, 100), payload_bytes("none", 2, 100)
    (34, 136, 400)
    """
    kind, number = parse_codec(codec)
    if kind == "none":
        return rows * columns * value_bytes
    if kind == "lowrank":
        return 2 * min(number, rows, columns) * (rows + columns)
    if kind == "topk":
        return 4 * rows * max(1, columns // number)
    return rows * -(-columns // GROUP) * (GROUP * BITS[kind] // 8 + SCALE_BYTES)


def closed_loop_error(trajectory: Iterable[Any], roundtrip: Callable[[Any], Any], momentum: float = 0.0) -> float:
    """Σ ‖x − ref‖² / Σ ‖x − (x a step before)‖² over a trajectory x_0, x_1, … of one stream: what receivers get wrong, per unit of change.

    `roundtrip` encodes and decodes a residual. The first x is taken as received exactly (a keyframe). The prediction of the next step is
    ref + momentum · (ref − ref before). Arrays may be torch's or numpy's: they need arithmetic and `.sum()`. Raises UsageError if nothing changes.
    """
    states = iter(trajectory)
    before = ref = next(states, None)
    drift: Any = 0.0
    error = change = 0.0
    for x in states:
        guess = ref + momentum * drift
        received = guess + roundtrip(x - guess)
        drift, ref = received - ref, received
        error += float(((x - ref) ** 2).sum())
        change += float(((x - before) ** 2).sum())
        before = x
    if change == 0.0:
        raise UsageError("this trajectory has no error to measure", "it needs at least two steps that differ")
    return error / change


def _known() -> str:
    return ", ".join([*BITS, *(f"{kind}-N" for kind in NUMBERED)])
