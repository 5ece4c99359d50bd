"""Where a command's words go: the answer to stdout, everything else to stderr.

A command returns an `Answer`, so that none of them can print half a JSON document: `--json` is a decision of `main`, taken once.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dite.errors import DiteError

PIPED_WIDTH = 160  # columns in a file or a pipe, where rich would assume 80 and break the names of layers


@dataclass(frozen=True)
class Answer:
    """What a command found: `document` for `--json`, `human` (text or anything rich can draw) otherwise.

    `failure` is for an answer that is complete and still no success, as when a quality gate fails or doctor finds a package missing:
    the answer is printed, then the error, and the exit code is the error's.
    """

    document: dict[str, Any]
    human: Any = ""
    failure: DiteError | None = field(default=None)


def print_answer(answer: Answer, stdout: TextIO, as_json: bool) -> None:
    """Print one answer: exactly one JSON document, or the human form."""
    if as_json:
        error = {"error": answer.failure.to_dict(), "exit_code": answer.failure.exit_code} if answer.failure else {}
        print_json(answer.document | error, stdout)
    elif isinstance(answer.human, str):
        stdout.write(answer.human.rstrip("\n") + "\n")
    else:
        Console(file=stdout, emoji=False, width=None if stdout.isatty() else PIPED_WIDTH).print(answer.human)
    stdout.flush()


def print_json(document: dict[str, Any], stdout: TextIO) -> None:
    """Numbers that JSON can't hold (an infinite PSNR, a NaN) become null: a strict parser must be able to read every document."""
    stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line for the person who waits, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


@contextmanager
def progress(off: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, moved by calling `tick(what, done, total)`; one row per stage, which is `what` up to a colon.

    Drawn by rank 0 only, and not at all off a terminal, where redrawing fills log files.
    """
    if off or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        rows: dict[str, Any] = {}

        def tick(what: str, done: int, total: int) -> None:
            stage = what.partition(":")[0]
            if stage not in rows:
                rows[stage] = bars.add_task(stage, total=total)
            bars.update(rows[stage], completed=done, total=total)

        yield tick


def megabytes(num_bytes: float) -> str:
    """Bytes as people read them, in powers of ten, like a file manager.

    >>> megabytes(31_415_926)
    '31.4 MB'
    """
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN compares false, so it is null too
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, bool | int | str | None) else str(value)
