"""JSON from a folder that nobody vouches for. Python's own reader lets the last of two equal keys win, takes NaN and 1e999 as numbers, guesses
encodings, and gives up on deep nesting with a RecursionError; every loader behind us reads the same bytes its own way. So only what all of them
read alike is let through.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dite.errors import CheckpointError

MAX_JSON_BYTES = 16_000_000
MAX_DEPTH = 64  # ours nest to 12
UNBOUNDED = "lambda_min_clipped"  # a key of diffusers' DPM-Solver schedulers, whose default -Infinity is written as such
MAX_DIGITS = 40  # tokenizers store 10^30 for "no limit"
HINT = "copy or download the folder again"


def read_strict(path: Path, name: str | None = None, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON mapping in `path`. Raises CheckpointError that names the file (as `name`) and the key."""
    name = name or f"{path.parent.name}/{path.name}"
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"{name} is too large", f"{size} bytes; at most {max_bytes} are read", "save the model again")
    try:
        return parse_strict(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{name} can't be read", str(error), HINT) from error


def parse_strict(data: bytes) -> dict[str, Any]:
    """The mapping that `data` holds. Raises ValueError: not UTF-8, not JSON, no mapping, a key twice, a number that is not finite, too deep."""
    try:
        values = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_float=_finite, parse_int=_short, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not a mapping")
    for path, value in leaves(values):  # raises where it is too deep
        if value == -math.inf and not path.endswith(UNBOUNDED):
            raise ValueError(f"{path} is -Infinity, no finite number")
    return values


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every number, text and null in `value`, by its dotted path."""
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{'.'.join(path[:3])}… is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield ".".join(path), value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {repeated[:80]!r} appears twice")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return float(text)


def _short(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; at most {MAX_DIGITS}")
    return int(text)


def _no_constant(text: str) -> Any:
    if text == "-Infinity":
        return -math.inf
    raise ValueError(f"{text} is no JSON")
