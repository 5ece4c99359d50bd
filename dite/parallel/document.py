"""Small JSON documents that people edit and ranks compare: read strictly, written whole, one text for one meaning.

Strict: one object, no duplicate keys (json keeps the last without a word), no NaN or Infinity (not JSON), no unknown keys, at most MOST_BYTES.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dite.errors import UsageError, did_you_mean

MOST_BYTES = 64 * 2**20


def parse(text: str, what: str) -> dict[str, Any]:
    """The object in `text`; `what` names it in errors ("a schedule"). Raises UsageError."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} can't be read", f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{what} can't be read", f"it must be a JSON object, not {kind_of(value)}")
    return value


def read(path: str | Path, what: str) -> str:
    """The text of a file of at most MOST_BYTES. Raises UsageError."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UsageError(f"{path} is too large for {what}", f"the limit is {MOST_BYTES} bytes")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read {what} from {path}", getattr(error, "strerror", None) or str(error)) from error


def write(path: str | Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never half of one, whatever happens meanwhile."""
    path = Path(path)
    partial = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            partial = stream.name
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)  # temporary files are for their owner only
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        raise UsageError(f"can't write {path}", error.strerror or str(error), "choose another place") from error


def canonical(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_keys(value: Any, required: Collection[str], optional: Collection[str], what: str) -> None:
    """Raise UsageError unless `value` is an object with all `required` keys and no others than the `optional` ones."""
    if not isinstance(value, dict):
        raise UsageError(f"{what} is wrong", f"it must be an object, not {kind_of(value)}")
    known = [*required, *optional]
    for key in value:
        if key not in known:
            raise UsageError(f"{what} has an unknown key {key!r}", f"its keys are {', '.join(known)}", did_you_mean(key, known))
    missing = [key for key in required if key not in value]
    if missing:
        raise UsageError(f"{what} lacks {', '.join(missing)}", f"its keys are {', '.join(known)}")


def check_list(value: Any, least: int, most: int, what: str) -> list[Any]:
    """`value`, a list of `least` to `most` entries; else UsageError."""
    if not isinstance(value, list):
        raise UsageError(f"{what} is wrong", f"it must be a list, not {kind_of(value)}")
    if not least <= len(value) <= most:
        raise UsageError(f"{what} has {len(value)} entries", f"it must have {least} to {most}")
    return value


def check_int(value: Any, least: int, most: int, what: str) -> int:
    """`value`, an integer (true and 1.0 are none) from `least` to `most`; else UsageError."""
    if type(value) is not int:
        raise UsageError(f"{what} is wrong", f"it must be an integer, not {kind_of(value)}")
    if not least <= value <= most:
        raise UsageError(f"{what} is {value}", f"it must be {least} to {most}")
    return value


def check_number(value: Any, least: float, most: float, what: str) -> float:
    """`value` as a float, a finite number from `least` to `most`; else UsageError."""
    if type(value) not in (int, float):
        raise UsageError(f"{what} is wrong", f"it must be a number, not {kind_of(value)}")
    if not (least <= value <= most) or not math.isfinite(value):
        raise UsageError(f"{what} is {value}", f"it must be {least:g} to {most:g}")
    return float(value)


def kind_of(value: Any) -> str:
    """What JSON calls the type of `value`."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
