"""Spend the bytes of an image where the change is: a codec for every (step, layer) that errs least within a byte budget.

    minimise Σ energy[s][l] · error(codec[s][l])      subject to      Σ bytes(codec[s][l], l) ≤ budget

The codecs of a layer are points (bytes, error per unit of energy). On their lower convex hull each step up buys less per byte than the one before, so
taking the best bargains first over all steps and layers (marginal gains) solves the relaxed problem exactly, where a codec may be split. It exceeds
the optimum by less than one single upgrade buys: nothing, among the thousands of cells of an image. Bargains that no longer fit are passed over for
smaller ones.

It assumes that each cell's error is its own: an int4 step behind a 1-bit one also encodes what that one left over. `squared_errors` of the closed
loop contain the feedback of like neighbours only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dite.errors import UsageError
from dite.parallel import document
from dite.parallel.rates import HEADER_BYTES, KEYFRAME_CODEC, SQUARED_ERRORS, parse_codec, payload_bytes
from dite.parallel.schedule import MOST_LAYERS, MOST_STEPS, Schedule


@dataclass(frozen=True)
class Profile:
    """What changes, as measured over an image: `energy[step][layer]` is ‖Δ‖², `shapes[layer]` the (rows, columns) that one rank sends in an
    exchange (K and V of its tokens, all samples), `ranks` the number of ranks. Energy of step 0, a keyframe, isn't used.
    """

    energy: tuple[tuple[float, ...], ...]
    shapes: tuple[tuple[int, int], ...]
    ranks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "energy", tuple(tuple(row) for row in self.energy))
        object.__setattr__(self, "shapes", tuple((rows, columns) for rows, columns in self.shapes))
        document.check_int(self.ranks, 2, 4096, "ranks")
        document.check_list(list(self.shapes), 1, MOST_LAYERS, "shapes")
        document.check_list(list(self.energy), 1, MOST_STEPS, "energy")
        for layer, shape in enumerate(self.shapes):
            for side in shape:
                document.check_int(side, 1, 2**31, f"shapes[{layer}]")
        for step, row in enumerate(self.energy):
            if len(row) != len(self.shapes):
                raise UsageError(f"energy[{step}] has {len(row)} layers", f"shapes has {len(self.shapes)}; they must agree")
            for layer, value in enumerate(row):
                document.check_number(value, 0.0, 1e30, f"energy[{step}][{layer}]")

    @property
    def elements(self) -> tuple[int, ...]:
        """Elements that one rank sends per exchange, per layer."""
        return tuple(rows * columns for rows, columns in self.shapes)

    def to_json(self) -> str:
        energy = [[float(value) for value in row] for row in self.energy]
        return document.canonical({"energy": energy, "ranks": self.ranks, "shapes": [list(shape) for shape in self.shapes]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UsageError for anything but a valid profile."""
        value = document.parse(text, "a profile")
        document.check_keys(value, ["energy", "shapes", "ranks"], [], "a profile")
        energy = document.check_list(value["energy"], 1, MOST_STEPS, "energy")
        rows = [document.check_list(row, 1, MOST_LAYERS, f"energy[{step}]") for step, row in enumerate(energy)]
        shapes = document.check_list(value["shapes"], 1, MOST_LAYERS, "shapes")
        sides = [document.check_list(shape, 2, 2, f"shapes[{layer}]") for layer, shape in enumerate(shapes)]
        return cls(tuple(map(tuple, rows)), tuple((rows, columns) for rows, columns in sides), value["ranks"])

    @classmethod
    def read(cls, path: str | Path) -> Self:
        return cls.from_json(document.read(path, "a profile"))

    def write(self, path: str | Path) -> None:
        document.write(path, self.to_json() + "\n")


@dataclass(frozen=True)
class Allocation:
    """`sent_bytes` is what one rank sends for an image, keyframe and headers included; `error` the sum that was minimised; no schedule within the
    budget has less than `least_error`.
    """

    schedule: Schedule
    sent_bytes: int
    error: float
    least_error: float


@dataclass(frozen=True)
class _Point:
    """A codec of a layer: what one exchange sends, and its error per unit of energy."""

    sent_bytes: int
    error: float
    codec: str


def allocate(
    profile: Profile,
    budget_bytes: int,
    squared_errors: Mapping[str, float] = SQUARED_ERRORS[2],
    value_bytes: int = 2,
    header_bytes: int = HEADER_BYTES,
) -> Allocation:
    """The schedule with the least summed error of which each rank sends at most `budget_bytes` an image, keyframe and headers included.

    `squared_errors`: codec → error per unit of ‖Δ‖²; these are the codecs to choose from. Raises UsageError, with the least possible bytes, if not
    even the smallest fit. The same arguments give the same schedule on every rank.
    """
    document.check_int(budget_bytes, 0, 2**62, "budget_bytes")
    for codec, error in squared_errors.items():
        parse_codec(codec)
        document.check_number(error, 0.0, 1e6, f"the error of {codec}")
    copies = profile.ranks - 1  # a packet passes all other ranks in a ring, or goes to each: either way a rank sends that many
    costs = [{codec: copies * (header_bytes + payload_bytes(codec, *shape, value_bytes)) for codec in squared_errors} for shape in profile.shapes]
    hulls = [_hull([_Point(sent, squared_errors[codec], codec) for codec, sent in cost.items()]) for cost in costs]
    keyframe_bytes = sum(copies * (header_bytes + payload_bytes(KEYFRAME_CODEC, *shape, value_bytes)) for shape in profile.shapes)
    steps = len(profile.energy)
    least_bytes = keyframe_bytes + (steps - 1) * sum(hull[0].sent_bytes for hull in hulls)
    if least_bytes > budget_bytes:
        raise UsageError(
            f"a budget of {budget_bytes} bytes an image is too small",
            f"the least possible is {least_bytes} bytes a rank: {steps} steps × {len(hulls)} layers × {copies} copies in the smallest codecs of "
            f"{', '.join(squared_errors)}, the first step in {KEYFRAME_CODEC}, {header_bytes} bytes a header",
            f"allow {least_bytes} bytes, or add smaller codecs",
        )
    return _spend(profile, hulls, budget_bytes - least_bytes, least_bytes)


def _spend(profile: Profile, hulls: Sequence[list[_Point]], room: int, spent: int) -> Allocation:
    """Take upgrades, the best bargains first, while `room` bytes last."""
    bargains = [
        (-energy * (hull[place].error - hull[place + 1].error) / (hull[place + 1].sent_bytes - hull[place].sent_bytes), step, layer, place)
        for step, row in enumerate(profile.energy)
        for layer, (energy, hull) in enumerate(zip(row, hulls, strict=True))
        for place in range(len(hull) - 1)
        if step and energy > 0
    ]
    chosen = [[0] * len(hulls) for _ in profile.energy]
    saved: list[float] = []
    relaxed = None  # what the relaxed problem saves beyond `saved` where it had to split an upgrade
    for rate, step, layer, place in sorted(bargains):
        extra = hulls[layer][place + 1].sent_bytes - hulls[layer][place].sent_bytes
        if extra > room and relaxed is None:
            relaxed = math.fsum(saved) - rate * room
        if extra <= room and chosen[step][layer] == place:
            chosen[step][layer] = place + 1
            room, spent = room - extra, spent + extra
            saved.append(-rate * extra)
    codecs = [[hull[place].codec for hull, place in zip(hulls, row, strict=True)] for row in chosen]
    codecs[0] = [KEYFRAME_CODEC] * len(hulls)
    start = math.fsum(energy * hull[0].error for row in profile.energy[1:] for energy, hull in zip(row, hulls, strict=True))
    error = math.fsum(e * hull[p].error for r, c in zip(profile.energy[1:], chosen[1:], strict=True) for e, hull, p in zip(r, hulls, c, strict=True))
    return Allocation(Schedule.from_table(codecs), spent, error, error if relaxed is None else min(error, max(0.0, start - relaxed)))


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The lower convex hull: bytes rise, errors fall, each step buys less per byte than the one before."""
    hull: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.sent_bytes, point.error, point.codec)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    if not hull:
        raise UsageError("no codecs to choose from", "squared_errors is empty")
    return hull


def _slope(a: _Point, b: _Point) -> float:
    """Error saved per byte."""
    return (a.error - b.error) / (b.sent_bytes - a.sent_bytes)
