"""`--fail-if 'psnr.mean<30'`: conditions on a command's JSON, parsed by hand and checked before any work begins."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dite.errors import QualityGateFailed, UsageError, did_you_mean

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
FORM = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """One condition: a dotted key of the JSON (list items by number, from 0), an operator, a number. It fails when it holds."""

    key: str
    symbol: str
    limit: float

    def holds(self, document: dict[str, Any]) -> bool:
        """Whether the gate fails. A figure that is no number (NaN, absent) can't prove quality, so it fails too."""
        value = _lookup(document, self.key)
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            return True
        return OPERATORS[self.symbol](value, self.limit)

    def __str__(self) -> str:
        return f"{self.key}{self.symbol}{self.limit:g}"


def parse_gates(texts: Sequence[str] | None, keys: Sequence[str]) -> list[Gate]:
    """Gates of `--fail-if`; `keys` are the dotted keys the command's JSON will have, with N for any list index.

    Raises UsageError with the nearest key for an unknown one.

    >>> str(parse_gates(["psnr.mean < 30"], ["psnr.mean"])[0])
    'psnr.mean<30'
    """
    return [_parse(text, keys) for text in texts or []]


def check_gates(gates: Sequence[Gate], document: dict[str, Any]) -> QualityGateFailed | None:
    """The error of the gates that fail, or None."""
    failed = [gate for gate in gates if gate.holds(document)]
    if not failed:
        return None
    found = ", ".join(f"{gate.key} is {_show(_lookup(document, gate.key))}" for gate in failed)
    return QualityGateFailed(
        "quality gate failed",
        f"{found}; --fail-if {', '.join(map(str, failed))}",
        "look at the worst samples in the report, or use a recipe with more bits",
    )


def _parse(text: str, keys: Sequence[str]) -> Gate:
    match = FORM.fullmatch(text)
    example = "for example --fail-if 'psnr.mean<30' (quote it: < and > mean something to the shell)"
    if not match:
        raise UsageError(f"--fail-if {text!r} can't be read", "the form is KEY<NUMBER, with <, <=, > or >=", example)
    key, symbol, number = match.groups()
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UsageError(f"--fail-if {text!r} can't be read", f"{number} is no finite number", example)
    if re.sub(r"\.\d+(?=\.|$)", ".N", key) not in {re.sub(r"\.\d+(?=\.|$)", ".N", known) for known in keys}:
        hint = did_you_mean(key, keys, cutoff=0.4) or "use one of those keys"
        raise UsageError(f"--fail-if: unknown key {key}", f"this command measures {', '.join(keys)}", hint)
    return Gate(key, symbol, limit)


def _lookup(document: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(document, dict):
            document = document.get(part)
        elif isinstance(document, list | tuple) and part.isdigit() and int(part) < len(document):
            document = document[int(part)]
        else:
            return None
    return document


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "absent"
