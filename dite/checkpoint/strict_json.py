"""JSON from a folder that nobody vouches for. Python's own reader lets the last of two equal keys win, takes NaN and 1e999 as numbers, guesses
encodings, and gives up on deep nesting with a RecursionError; every loader behind us reads the same bytes its own way. So only what all of them
read alike is let through.

Opening is guarded as well: a named pipe makes whoever opens it wait for ever, and a link leads out of the folder.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dite.errors import CheckpointError

MAX_JSON_BYTES = 16_000_000
MAX_DEPTH = 64  # ours nest to 12
UNBOUNDED = "lambda_min_clipped"  # a key of diffusers' DPM-Solver schedulers, whose default -Infinity is written as such
MAX_DIGITS = 40  # tokenizers store 10^30 for "no limit"
HINT = "copy or download the folder again"
BLOBS = re.compile(r"[0-9a-f]{40,64}")
# Not there on Windows, where these kinds of files aren't either; but binary has to be asked for.
GUARDED = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_strict(path: Path, name: str | None = None, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON mapping in `path`. Raises CheckpointError that names the file (as `name`) and the key."""
    name = name or f"{path.parent.name}/{path.name}"
    with opened(path, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(f"{name} is too large", f"{size} bytes; at most {max_bytes} are read", "save the model again")
        data = stream.read(max_bytes)
    try:
        return parse_strict(data)
    except ValueError as error:
        raise CheckpointError(f"{name} can't be read", str(error), HINT) from error


@contextmanager
def opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """`path`, open for reading, if it is a regular file; never waits. Raises CheckpointError that calls it `name`.

    No link is followed, other than those that the hub's cache consists of.
    """
    try:
        descriptor = os.open(blob_of(path) or path, GUARDED)
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(f"{name} is a link", "a model's files lie in its own folder", "copy the folder with links resolved") from error
        if error.errno == errno.ENXIO:  # a socket
            raise _irregular(name) from error
        raise CheckpointError(f"{name} can't be read", error.strerror or str(error), HINT) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _irregular(name)
    with open(descriptor, "rb") as stream:
        yield stream


def blob_of(path: Path) -> Path | None:
    """The file of the hub's cache that `path`, a link in one of its snapshots (or in a part of one), stands for; None for all else."""
    if not path.is_symlink():
        return None
    cache = next((folder.parent.parent for folder in path.absolute().parents[:3] if folder.parent.name == "snapshots"), None)
    target = path.resolve()
    return target if cache is not None and target.parent == (cache / "blobs").resolve() and BLOBS.fullmatch(target.name) else None


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
    if _nests_deep(values) or b"-Infinity" in data:  # a tokenizer has a million leaves: their paths are spelled out only where one may be refused
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


def _nests_deep(values: dict[str, Any]) -> bool:
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer) if isinstance(item, dict | list)]
    return bool(level)


def _irregular(name: str) -> CheckpointError:
    return CheckpointError(f"{name} is not a regular file", "pipes, devices and folders can't be loaded", "don't load this folder")


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
