"""Modes as a user writes them, and which rank does what in them.

    kv_gather     each rank holds some tokens; K and V of all are gathered                       CompactFusion's compressed patch parallelism
    ring          the same, but K and V go round while attention is computed                     Ring Attention (arXiv 2310.01889)
    ulysses       tokens are exchanged for heads before attention, and back after it             DeepSpeed-Ulysses (arXiv 2309.14509)
    displaced     K and V of the previous step, exchanged during this one                        DistriFusion (arXiv 2402.19481)
    pipefusion    each rank holds some blocks; patches of tokens flow through them               PipeFusion (arXiv 2405.14430)
    cfg           the rows of a batch, conditional and null, on different ranks

`cfg+ring`, `ulysses+ring`, `cfg+ulysses+ring` are products; a number fixes a degree: `ulysses2+ring4`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from dite.errors import UsageError, did_you_mean

TOKEN_MODES = ("kv_gather", "ring", "ulysses", "displaced", "pipefusion")
MODES = ("cfg", *TOKEN_MODES)
STALE = ("displaced", "pipefusion")  # ranks compute with what their peers had a step ago: exact with no codec
_WORD = re.compile(r"([a-z_]+?)([1-9]\d*)?")


@dataclass(frozen=True)
class Topology:
    """`cfg` groups of `tokens` ranks each; within them `mode`, one of TOKEN_MODES, or ulysses inside (`ulysses` ranks) and ring outside (`ring`)."""

    cfg: int = 1
    mode: str = "kv_gather"
    tokens: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def world(self) -> int:
        return self.cfg * self.tokens

    def token_group(self, rank: int) -> list[int]:
        """The ranks that share this rank's rows of the batch."""
        first = rank // self.tokens * self.tokens
        return list(range(first, first + self.tokens))

    def token_groups(self) -> list[list[int]]:
        return [self.token_group(first) for first in range(0, self.world, self.tokens)]

    def cfg_groups(self) -> list[list[int]]:
        """The ranks with the same tokens of different rows."""
        return [list(range(first, self.world, self.tokens)) for first in range(self.tokens)]

    def ulysses_groups(self) -> list[list[int]]:
        """Neighbours, which hold neighbouring tokens."""
        return [list(range(first, first + self.ulysses)) for first in range(0, self.world, self.ulysses)]

    def ring_groups(self) -> list[list[int]]:
        """The ranks with the same heads of different tokens."""
        return [list(range(group[0] + offset, group[-1] + 1, self.ulysses)) for group in self.token_groups() for offset in range(self.ulysses)]


def bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """Where each of `parts` begins and ends; the first ones have one more where they can't be equal.

    >>> bounds(7, 3)
    [(0, 3), (3, 5), (5, 7)]
    """
    small, more = divmod(count, parts)
    edges = [part * small + min(part, more) for part in range(parts + 1)]
    return list(pairwise(edges))


def parse(text: str, degree: int) -> Topology:
    """The topology of a mode's name on `degree` ranks. Raises UsageError.

    >>> parse("cfg+ulysses2+ring", 8)
    Topology(cfg=2, mode='ulysses+ring', tokens=4, ulysses=2, ring=2)
    """
    if not 1 <= degree <= 128:
        raise UsageError(f"{degree} ranks can't be used", "there are 1 to 128", "choose another degree")
    degrees: dict[str, int | None] = {}
    for word in text.split("+"):
        match = _WORD.fullmatch(word.strip())
        if match is None or match[1] not in MODES:
            raise UsageError(f"no mode {word.strip()!r}", f"there are {', '.join(MODES)}, and products as cfg+ring", did_you_mean(word, MODES))
        if match[1] in degrees:
            raise UsageError(f"mode {text!r} has {match[1]} twice", "each may stand once", f"use {match[1]} with the product of both degrees")
        degrees[match[1]] = int(match[2]) if match[2] else None
    cfg = (degrees.pop("cfg") or 2) if "cfg" in degrees else 1
    if degree % cfg:
        raise UsageError(f"mode {text!r} can't use {degree} ranks", f"cfg degree {cfg} must divide them", f"use {cfg * max(1, degree // cfg)} ranks")
    rest = degree // cfg
    if not degrees:
        if rest > 1:
            raise UsageError(f"mode {text!r} can't use {degree} ranks", f"cfg alone uses {cfg}", f"use {cfg} ranks, or cfg+kv_gather")
        return Topology(cfg)
    if set(degrees) == {"ulysses", "ring"}:
        return _both(text, cfg, rest, degrees)
    if len(degrees) > 1:
        raise UsageError(f"mode {text!r} is no product that dite knows", "ulysses+ring, and cfg with any one mode", "use one of those")
    ((mode, wanted),) = degrees.items()
    if wanted not in (None, rest):
        raise UsageError(f"mode {text!r} doesn't fit {degree} ranks", f"{cfg} × {wanted} = {cfg * wanted}", f"use {cfg * wanted} ranks")
    return Topology(cfg, mode, rest, *((rest, 1) if mode == "ulysses" else (1, rest) if mode == "ring" else (1, 1)))


def _both(text: str, cfg: int, rest: int, degrees: dict[str, int | None]) -> Topology:
    ulysses, ring = degrees["ulysses"], degrees["ring"]
    if ulysses is None:
        ulysses = rest // ring if ring else max(size for size in range(1, rest + 1) if rest % size == 0 and size * size <= rest)
    ring = ring or rest // max(1, ulysses)
    if ulysses * ring != rest:
        raise UsageError(f"mode {text!r} doesn't fit {cfg * rest} ranks", f"{cfg} × {ulysses} × {ring} = {cfg * ulysses * ring}", "change a degree")
    return Topology(cfg, "ulysses+ring", rest, ulysses, ring)
