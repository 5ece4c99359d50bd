"""What the safetensors files of a folder claim to hold, read from their first bytes and checked against their sizes; no tensor is touched.

The safetensors library alone accepts duplicate names, shapes of 2^40 and names like `../../x`, and hangs on a named pipe. Several files of one
model have an index (`*.safetensors.index.json`), whose names diffusers joins to the folder's path unread: it could point anywhere.
"""

import math
import os
from pathlib import Path
from typing import Any

from dite.checkpoint.strict_json import opened, parse_strict, read_strict
from dite.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000  # FLUX.1 has 780, quantized 2,600
MAX_RANK, MAX_SIZE = 16, 2**48
INDEX = ".safetensors.index.json"
USUAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # beside which others are variants, which nobody asked for
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
KEYS = {"dtype", "shape", "data_offsets"}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The tensor entries of a safetensors file, checked: unique names, known dtypes, sizes that fit shapes, no gap, no overlap."""
    with opened(file, f"{file.parent.name}/{file.name}") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _bad(file, f"its header claims {length} bytes of the file's {size}")
        try:
            header = parse_strict(stream.read(length))
        except ValueError as error:
            raise _bad(file, f"its header is not valid JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(file, "__metadata__ is no mapping of texts")
    if len(header) > MAX_TENSORS:
        raise _bad(file, f"its header lists {len(header)} tensors; at most {MAX_TENSORS}")
    end = 0
    for name, begin, stop in sorted(((name, *_extent(file, name, entry)) for name, entry in header.items()), key=lambda item: item[1:]):
        if begin != end:
            raise _bad(file, f"tensor {name!r} begins at {begin}, the one before ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise _bad(file, f"its tensors end at {8 + length + end}, the file at {size}")
    return header


def stored_tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of every tensor that a loader would read in `folder`: of the files its index names, or of its one safetensors file."""
    indexes = [folder / f"{name}.index.json" for name in USUAL if (folder / f"{name}.index.json").is_file()]
    usual = [folder / name for name in USUAL if (folder / name).is_file()]
    if not indexes and not usual:
        indexes = visible(folder, f"*{INDEX}")
    if not indexes:
        found: dict[str, dict[str, Any]] = {}
        for file in usual or visible(folder, "*.safetensors"):
            for name, entry in read_header(file).items():
                if name in found:
                    raise _bad(file, f"tensor {name!r} is in another file too")
                found[name] = entry
        return found
    merged: dict[str, dict[str, Any]] = {}
    for index in indexes:
        merged |= _indexed(index)
    return merged


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files by their pattern, without hidden ones: no loader reads those, pathlib's glob finds them, and manifests need not list them."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def numel(entry: dict[str, Any]) -> int:
    """How many numbers a tensor's entry stands for."""
    return math.prod(entry["shape"])


def _indexed(index: Path) -> dict[str, dict[str, Any]]:
    label = f"{index.parent.name}/{index.name}"
    places = read_strict(index, label).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{label} can't be read", "weight_map is no mapping from tensors to files", "copy or download the folder again")
    outside = next(
        (place for place in places.values() if Path(place).name != place or place.startswith(".") or not place.endswith(".safetensors")), None
    )
    if outside is not None:
        raise CheckpointError(f"{label} points at {outside!r}", "weight_map names safetensors files of its own folder only", "don't load this folder")
    found: dict[str, dict[str, Any]] = {}
    for place in sorted(set(places.values())):
        if not (index.parent / place).is_file():
            raise CheckpointError(f"{index.parent.name}/{place} is missing", f"{label} names it in weight_map", "download the folder again")
        for name, entry in read_header(index.parent / place).items():
            if places.get(name) != place:
                raise CheckpointError(
                    f"{label} is not this model's", f"{place} holds tensor {name!r}, weight_map says otherwise", "download it again"
                )
            found[name] = entry
    missing = next((name for name in places if name not in found), None)
    if missing is not None:
        raise CheckpointError(f"{label} is not this model's", f"weight_map lists {missing!r}, which no file holds", "download it again")
    return found


def _extent(file: Path, name: str, entry: Any) -> tuple[int, int]:
    try:
        (begin, stop), shape, width = entry["data_offsets"], entry["shape"], ITEM_BYTES[entry["dtype"]]
        numbers = [begin, stop, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise _bad(file, f"tensor {name!r} has no valid dtype, shape and offsets") from error
    if set(entry) != KEYS:
        raise _bad(file, f"tensor {name!r} has a key {sorted(set(entry) - KEYS)[0]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise _bad(file, f"tensor {name!r} has no shape of at most {MAX_RANK} sizes")
    if not all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers):
        raise _bad(file, f"tensor {name!r} has a size that is not a whole number from 0 to 2^48")
    if stop - begin != width * math.prod(shape):
        raise _bad(file, f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} can't take {stop - begin} bytes")
    return begin, stop


def _bad(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file.parent.name}/{file.name} is not a sound safetensors file", why, "copy or download it again")
