"""The server's log: one JSON line on stderr for each happening, and never what a client asked to see."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PRIVATE = frozenset({"prompt", "negative_prompt", "condition"})
FRAMES = 12  # of a failure's traceback, the innermost
HOLLOW = ("_wrapped_call_impl", "_call_impl")  # two frames of torch's for every module


def log(event: str, /, **facts: Any) -> None:
    """Write one line. Objects that JSON has no word for appear as their type's name: the repr of a request would hold its prompt."""
    assert not PRIVATE & facts.keys(), f"{sorted(PRIVATE & facts.keys())} must not be logged"
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"time": now, "event": event} | facts, default=lambda value: f"<{type(value).__name__}>")
    with suppress(OSError, ValueError):  # a log that can't be written stops no picture
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def failure(error: BaseException) -> dict[str, Any]:
    """An unexpected error as facts: its type and where it was raised. Not its message, which may quote what a client sent."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name not in HOLLOW][-FRAMES:]
    return {"error": type(error).__name__, "where": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]}


class Lines(logging.Handler):
    """Records of other libraries, as our lines: the first line of what they say, and for errors the type and the place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`."""
        said = (record.getMessage().strip().splitlines() or [""])[0]
        error = record.exc_info[1] if record.exc_info else None
        log("library", library=record.name, level=record.levelname.lower(), message=said, **(failure(error) if error else {}))


def adopt(*libraries: str) -> None:
    """Send what these libraries log into our log, from ERROR on: clients can cause as many of their warnings as they like."""
    for library in libraries:
        logger = logging.getLogger(library)
        logger.handlers, logger.propagate = [Lines()], False
        logger.setLevel(logging.ERROR)
