"""A bench's document on paper: JSON for machines, a table for people."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dite_kernels.backends import BackendUnavailable


def write(document: dict[str, Any], path: Path) -> None:
    """Renamed into place, so that no reader meets half a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def aligned(lines: Sequence[Sequence[str]], words: int, legend: str, notes: list[str]) -> str:
    """Headings and rows as columns, the first `words` of them aligned left; then what a ratio is, and the notes."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) if index < words else cell.rjust(width) for index, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*text, legend, *(f"note: {note}" for note in notes)])


def reason(error: Exception) -> str:
    """Why something has no time, in a line: what a backend says, or that it failed, and how.

    >>> reason(OSError("no compiler\\nmany lines"))
    'failed, OSError: no compiler'
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines and isinstance(error, BackendUnavailable) else f"failed, {type(error).__name__}: {lines[0] if lines else ''}"
