"""Messages between the HTTP process and a rank: strict JSON with a type, and raw bytes behind it. Nothing is unpickled.

magic "dite" │ JSON bytes, uint32 │ raw bytes, uint64 │ JSON │ raw
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import struct
import threading
from typing import Any

HEADER = struct.Struct("<4sIQ")
MAGIC = b"dite"
MOST_JSON_BYTES = 16 * 2**20
MOST_RAW_BYTES = 2**30

Message = dict[str, Any]


class BadFrame(Exception):
    """What came through a pipe is no message."""


def pack(message: Message, raw: bytes = b"") -> bytes:
    """One message as bytes."""
    text = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MOST_JSON_BYTES or len(raw) > MOST_RAW_BYTES:
        raise BadFrame(f"a message of {len(text)} and {len(raw)} bytes is too large: at most {MOST_JSON_BYTES} and {MOST_RAW_BYTES}")
    return HEADER.pack(MAGIC, len(text), len(raw)) + text + raw


def sizes(header: bytes) -> tuple[int, int]:
    """Bytes of JSON and of raw data behind a header. Raises BadFrame."""
    magic, text, raw = HEADER.unpack(header)
    if magic != MAGIC or text > MOST_JSON_BYTES or raw > MOST_RAW_BYTES:
        raise BadFrame(f"no message begins with {header!r}")
    return text, raw


def parse(text: bytes) -> Message:
    """The JSON of a message: an object with a string `type`, without NaN. Raises BadFrame."""

    def refuse(constant: str) -> Any:
        raise BadFrame(f"{constant} is no JSON")

    try:
        message = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"a message can't be parsed: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise BadFrame("a message is a JSON object with a type")
    return message


async def read(reader: asyncio.StreamReader) -> tuple[Message, bytes] | None:
    """The next message; None when the other end is closed, even in the middle of one. Raises BadFrame."""
    try:
        text, raw = sizes(await reader.readexactly(HEADER.size))
        return parse(await reader.readexactly(text)), await reader.readexactly(raw)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Channel:
    """A rank's end, without asyncio. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: Message, raw: bytes = b"") -> None:
        """Raises OSError when nobody listens any more."""
        data = pack(message, raw)
        with self._lock:
            self._socket.sendall(data)

    def receive(self, wait: bool) -> tuple[Message, bytes] | None:
        """The next message; None when there is none yet and `wait` is false. Raises EOFError when the other end is closed."""
        if not wait and not select.select([self._socket], [], [], 0)[0]:
            return None
        text, raw = sizes(self._exactly(HEADER.size))
        return parse(self._exactly(text)), self._exactly(raw)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(min(count - len(data), 2**20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
