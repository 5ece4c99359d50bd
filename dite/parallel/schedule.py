"""Which codec each (step, layer) of an image uses. Two forms, one meaning; every rank must hold the same digest.

    rules   {"default": "int4", "rules": [{"steps": "0-9", "layers": "*", "codec": "int8"}]}    the last rule that matches wins
    table   {"codecs": ["int4", "int8"], "table": [[1, 1, 0], [0, 0, 0]], "repeat_last": true}  table[step][layer] is an index into codecs

Ranges are `*`, `7`, `0-9` (both ends included), `40-` (to the end), and several with commas: `0-3,40-`. A table knows its size: a layer past it is
refused, and so is a step, unless `repeat_last` says that its last row goes on. Steps count sampler iterations from 0. The first exchange of a stream
is a keyframe in int8 whatever the schedule says.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

from dite.errors import UsageError
from dite.parallel import document
from dite.parallel.rates import parse_codec

MOST_STEPS = 10_000
MOST_LAYERS = 10_000
MOST_CELLS = 4_000_000
MOST_RULES = 1_000
MOST_CODECS = 256
RANGE = re.compile(r"(0|[1-9][0-9]{0,6})(-(0|[1-9][0-9]{0,6})?)?")


@dataclass(frozen=True)
class Rule:
    """`codec` for the steps and layers of two ranges."""

    steps: str
    layers: str
    codec: str

    def __post_init__(self) -> None:
        _spans(self.steps)
        _spans(self.layers)
        parse_codec(self.codec)

    def matches(self, step: int, layer: int) -> bool:
        return _within(step, self.steps) and _within(layer, self.layers)


@dataclass(frozen=True)
class Schedule:
    """Build one with `constant`, `from_rules`, `from_table`, `from_json` or `read`. Equal schedules have equal digests.

    >>> schedule = Schedule.from_rules("int4", [Rule("0-9", "*", "int8")])
    >>> schedule.codec(9, 3), schedule.codec(10, 3)
    ('int8', 'int4')
    """

    default: str = ""
    rules: tuple[Rule, ...] = ()
    codecs: tuple[str, ...] = ()
    table: tuple[tuple[int, ...], ...] = ()
    repeat_last: bool = False

    @classmethod
    def constant(cls, codec: str) -> Self:
        """One codec everywhere."""
        return cls.from_rules(codec, ())

    @classmethod
    def from_rules(cls, default: str, rules: Sequence[Rule]) -> Self:
        """`default` wherever no rule matches; the last rule that matches wins."""
        parse_codec(default)
        return cls(default=default, rules=tuple(rules))

    @classmethod
    def from_table(cls, rows: Sequence[Sequence[str]], repeat_last: bool = False) -> Self:
        """`rows[step][layer]` are names of codecs. Raises UsageError for a table that is empty, ragged or too large."""
        _check_size(rows)
        # Numbered in the order of first use, so that one table has one text.
        codecs = tuple(dict.fromkeys(codec for row in rows for codec in row))
        for codec in codecs:
            parse_codec(codec)
        if len(codecs) > MOST_CODECS:
            raise UsageError(f"a schedule with {len(codecs)} codecs", f"at most {MOST_CODECS} are allowed")
        index = {codec: place for place, codec in enumerate(codecs)}
        return cls(codecs=codecs, table=tuple(tuple(index[codec] for codec in row) for row in rows), repeat_last=repeat_last)

    def codec(self, step: int, layer: int) -> str:
        """The codec of this step and layer, both from 0. Raises UsageError for one that the table doesn't have."""
        if step < 0 or layer < 0:
            raise UsageError(f"no codec for step {step}, layer {layer}", "steps and layers count from 0")
        if not self.table:
            return next((rule.codec for rule in reversed(self.rules) if rule.matches(step, layer)), self.default)
        if layer >= len(self.table[0]):
            raise UsageError(f"no codec for layer {layer}", f"the schedule is for {len(self.table[0])} layers, 0 to {len(self.table[0]) - 1}")
        if step >= len(self.table) and not self.repeat_last:
            raise UsageError(
                f"no codec for step {step}",
                f"the schedule is for {len(self.table)} steps, 0 to {len(self.table) - 1}",
                'sample with as many steps, or let the last row go on with "repeat_last": true',
            )
        return self.codecs[self.table[min(step, len(self.table) - 1)][layer]]

    def check(self, steps: int, layers: int) -> None:
        """Raise UsageError unless there is a codec for each of `steps` × `layers`: asked before an image, not in its midst."""
        self.codec(steps - 1, layers - 1)
        if self.table and layers != len(self.table[0]):
            raise UsageError(f"the schedule is for {len(self.table[0])} layers", f"the model exchanges {layers}", "measure a profile of this model")

    def to_json(self) -> str:
        """The canonical text: equal schedules give equal texts."""
        return document.canonical(self._document())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UsageError for anything but a valid schedule."""
        value = document.parse(text, "a schedule")
        return cls._from_table_document(value) if {"table", "codecs", "repeat_last"} & value.keys() else cls._from_rules_document(value)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        return cls.from_json(document.read(path, "a schedule"))

    def write(self, path: str | Path) -> None:
        """Replace the file at `path`, whole or not at all."""
        document.write(path, self.to_json() + "\n")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical text, for the handshake of ranks."""
        return document.digest(self.to_json())

    def _document(self) -> dict[str, Any]:
        if self.table:
            ending = {"repeat_last": True} if self.repeat_last else {}
            return {"codecs": list(self.codecs), "table": [list(row) for row in self.table], **ending}
        rules = [{"steps": rule.steps, "layers": rule.layers, "codec": rule.codec} for rule in self.rules]
        return {"default": self.default, **({"rules": rules} if rules else {})}

    @classmethod
    def _from_rules_document(cls, value: dict[str, Any]) -> Self:
        document.check_keys(value, ["default"], ["rules"], "a schedule of rules")
        rules = document.check_list(value.get("rules", []), 0, MOST_RULES, "rules")
        for place, rule in enumerate(rules):
            document.check_keys(rule, ["steps", "layers", "codec"], [], f"rule {place}")
        return cls.from_rules(value["default"], [Rule(**rule) for rule in rules])

    @classmethod
    def _from_table_document(cls, value: dict[str, Any]) -> Self:
        document.check_keys(value, ["codecs", "table"], ["repeat_last"], "a schedule with a table")
        codecs = document.check_list(value["codecs"], 1, MOST_CODECS, "codecs")
        for codec in codecs:
            parse_codec(codec)
        if len(set(codecs)) < len(codecs):
            raise UsageError("codecs has the same codec twice", f"it is {', '.join(codecs)}")
        repeat_last = value.get("repeat_last", False)
        if not isinstance(repeat_last, bool):
            raise UsageError("repeat_last is wrong", f"it must be true or false, not {document.kind_of(repeat_last)}")
        table = document.check_list(value["table"], 1, MOST_STEPS, "table")
        for step, row in enumerate(table):
            document.check_list(row, 1, MOST_LAYERS, f"table[{step}]")
        _check_size(table)
        most = len(codecs) - 1
        rows = [[codecs[document.check_int(index, 0, most, f"table[{s}][{n}]")] for n, index in enumerate(row)] for s, row in enumerate(table)]
        return cls.from_table(rows, repeat_last)


def _check_size(rows: Sequence[Sequence[Any]]) -> None:
    if not rows or not rows[0]:
        raise UsageError("an empty schedule", "a table has at least one step and one layer")
    if len(rows) > MOST_STEPS or len(rows[0]) > MOST_LAYERS or len(rows) * len(rows[0]) > MOST_CELLS:
        limits = f"at most {MOST_STEPS} × {MOST_LAYERS}, and {MOST_CELLS} in all, are allowed"
        raise UsageError(f"a schedule of {len(rows)} steps × {len(rows[0])} layers", limits)
    ragged = next((step for step, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if ragged is not None:
        raise UsageError(f"table[{ragged}] has {len(rows[ragged])} layers", f"table[0] has {len(rows[0])}; all rows must agree")


@lru_cache(maxsize=4 * MOST_RULES)
def _parsed(text: str) -> tuple[tuple[int, int | None], ...]:
    spans = []
    for part in text.split(","):
        match = RANGE.fullmatch(part)
        if match is None:
            raise UsageError(f"{text!r} is no range", "ranges are *, 7, 0-9, 40- and several of these with commas between")
        first = int(match[1])
        last = first if match[2] is None else int(match[3]) if match[3] else None
        if last is not None and last < first:
            raise UsageError(f"{text!r} is no range", f"{first}-{last} ends before it begins", f"write {last}-{first}")
        spans.append((first, last))
    return tuple(spans)


def _spans(text: Any) -> tuple[tuple[int, int | None], ...]:
    """(first, last) of each part of a range, both included; last is None where it has no end."""
    if not isinstance(text, str):
        raise UsageError(f"{text!r} is no range", f'a range is a string such as "0-9" or "*", not {document.kind_of(text)}')
    return ((0, None),) if text == "*" else _parsed(text)


def _within(number: int, text: str) -> bool:
    return any(first <= number and (last is None or number <= last) for first, last in _spans(text))
