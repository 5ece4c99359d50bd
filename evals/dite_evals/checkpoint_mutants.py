"""Ways to spoil the files of a saved model at random: bytes, JSON fields, headers, tensors, whole files. The same seed spoils the same way.

A mutant is a dictionary from file names to new contents; None removes the file, and `LINK`, `PIPE` and `FOLDER` put something else there.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

LINK, PIPE, FOLDER = "link", "pipe", "folder"
Content = bytes | str | None
Files = dict[str, bytes]
NUMBERS = [0, 1, -1, 2, 3, 4, 16, 17, 2**15, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-30, 1e300]
VALUES = [*NUMBERS, None, True, False, "", "x", "../x", "\0", [], [0], [[]], {}, {"a": 1}]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", ""]
RAW = ["1e999", "NaN", "-Infinity", "[" * 3000, "9" * 5000, "", "tru", '"\\ud800"']


def mutate(files: Files, draw: random.Random) -> tuple[str, dict[str, Content]]:
    """A kind of mutation, and what it makes of some of `files`."""
    kind = draw.choice(list(KINDS))
    return kind, KINDS[kind](files, draw)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], body: bytes) -> bytes:
    """The inverse of `split`, padded as the library pads."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _bytes(files: Files, draw: random.Random) -> dict[str, Content]:
    """Flip, set, cut, insert, repeat or clear some bytes of a file; near its beginning as often as anywhere."""
    name = draw.choice(list(files))
    data = bytearray(files[name])
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        at = draw.randrange(max(1, min(len(data), draw.choice([16, 400, len(data)]))))
        size = draw.choice([1, 1, 2, 8, 100])
        match draw.randrange(6):
            case 0 if data:
                data[at] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[at] = draw.randrange(256)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = draw.randbytes(size)
            case 4:
                data[at:at] = data[at : at + size]
            case _:
                data[at : at + size] = bytes(len(data[at : at + size]))
    return {name: bytes(data)}


def _field(files: Files, draw: random.Random) -> dict[str, Content]:
    """Another value, no value, one more key, or a key twice, somewhere in a JSON file."""
    name = draw.choice([name for name in files if name.endswith(".json")])
    values = json.loads(files[name])
    holder, key = _somewhere(values, draw)
    match draw.randrange(6):
        case 0 | 1:
            holder[key] = draw.choice(VALUES)
        case 2:
            del holder[key]
        case 3 if isinstance(holder, dict):
            holder[draw.choice(["x", key + "x", "", "a" * 1000])] = draw.choice(VALUES)
        case 4 if isinstance(holder, dict):
            holder["\0twice"] = holder[key]
            return {name: json.dumps(values).replace('"\\u0000twice"', json.dumps(key)).encode()}
        case _:
            holder[key] = "\0raw"
            return {name: json.dumps(values).replace('"\\u0000raw"', draw.choice(RAW)).encode()}
    return {name: json.dumps(values).encode()}


def _header(files: Files, draw: random.Random) -> dict[str, Content]:
    """A header that says something else than before."""
    name = _weights(files, draw)
    header, body = split(files[name])
    tensor = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    match draw.randrange(7):
        case 0:
            entry["dtype"] = draw.choice(DTYPES)
        case 1:
            entry["shape"] = [draw.choice([*entry["shape"], *NUMBERS]) for _ in range(draw.randrange(4))]
        case 2:
            entry["data_offsets"] = [draw.choice([*entry["data_offsets"], *NUMBERS]) for _ in range(draw.choice([1, 2, 2, 2, 3]))]
        case 3:
            header[draw.choice([tensor + "x", "../x", "", "__metadata__"])] = header.pop(tensor)
        case 4:
            other = draw.choice([key for key in header if key != "__metadata__"])
            header[tensor], header[other] = header[other], header[tensor]
        case 5:
            entry["shape"] = entry["shape"][::-1]
        case _:
            data = bytearray(join(header, body))
            data[:8] = struct.pack("<Q", draw.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8, len(data) - 9]))
            return {name: bytes(data)}
    return {name: join(header, body)}


def _tensor(files: Files, draw: random.Random) -> dict[str, Content]:
    """A sound file of other tensors: one dropped, added, renamed, of another size, or with other numbers in it."""
    name = _weights(files, draw)
    header, body = split(files[name])
    metadata = {key: header.pop(key) for key in list(header) if key == "__metadata__"}
    parts = {key: (entry, body[slice(*entry["data_offsets"])]) for key, entry in header.items()}
    key = draw.choice(list(parts))
    entry, data = parts[key]
    match draw.randrange(6):
        case 0:
            del parts[key]
        case 1:
            parts[key + "x"] = parts[key]
        case 2 if entry["shape"]:
            rows, *rest = entry["shape"]
            parts[key] = ({**entry, "shape": [2 * rows, *rest]}, data + data)
        case 3:  # scales and the like: every pattern of NaN, infinity, zero, negative
            pattern = draw.choice([b"\x00", b"\xff", b"\x00\x7c", b"\x00\xfc", b"\x00\x00\x80\x7f", b"\x00\x80", draw.randbytes(2)])
            at = draw.randrange(max(1, len(data)))
            parts[key] = (entry, (data[:at] + pattern + data[at + len(pattern) :])[: len(data)])
        case 4:
            parts[key] = (entry, draw.randbytes(len(data)))
        case _:
            other = draw.choice([one for one in parts if parts[one][0]["shape"] == entry["shape"]])
            parts[key], parts[other] = parts[other], parts[key]
    return {name: _joined(metadata, parts)}


def _file(files: Files, draw: random.Random) -> dict[str, Content]:
    """A file removed, emptied, cut, exchanged for another one, for a link, a pipe or a folder; or one too many."""
    name = draw.choice(list(files))
    match draw.randrange(6):
        case 0:
            return {name: None}
        case 1:
            return {name: draw.choice([b"", b"\0", b"{}", b"[]", b"null", files[name][: draw.randrange(len(files[name]))]])}
        case 2:
            return {name: files[draw.choice(list(files))]}
        case 3:
            return {name: draw.choice([LINK, PIPE, FOLDER])}
        case 4:
            extra = draw.choice(["x.safetensors", "more.json", "model.bin", "x.py", "diffusion_pytorch_model.safetensors.index.json", "README.md"])
            index = json.dumps({"weight_map": {"a": draw.choice(["../x.safetensors", "x.safetensors", name])}}).encode()
            return {extra: draw.choice([b"", index, files[name]])}
        case _:
            other = draw.choice(list(files))
            return {name: files[other], other: files[name]}


KINDS: dict[str, Callable[[Files, random.Random], dict[str, Content]]] = {
    "bytes": _bytes,
    "field": _field,
    "header": _header,
    "tensor": _tensor,
    "file": _file,
}


def _weights(files: Files, draw: random.Random) -> str:
    return draw.choice([name for name in files if name.endswith(".safetensors")])


def _joined(metadata: dict[str, Any], parts: dict[str, tuple[dict[str, Any], bytes]]) -> bytes:
    header, body = dict(metadata), b""
    for key, (entry, data) in parts.items():
        header[key] = {**entry, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return join(header, body)


def _somewhere(values: Any, draw: random.Random) -> tuple[Any, Any]:
    """A mapping or list somewhere inside `values`, and one of its keys."""
    places: list[tuple[Any, Any]] = []

    def visit(holder: Any) -> None:
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            places.append((holder, key))
            if isinstance(value, dict | list):
                visit(value)

    visit(values)
    return draw.choice(places)
