"""What a saved folder must be: pure checks, no tensors, no torch. This is the boundary that hostile folders meet.

Order: every listed file is a regular file inside the folder and has its size; the manifest is strict; each safetensors header agrees with its
file; digests agree. Only then is anything allocated. The safetensors library alone accepts duplicate names, shapes of 2^40 and names like
`../../x`, and hangs on a named pipe.
"""

import hashlib
import json
import math
import os
import stat
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from dite.errors import CheckpointError
from dite.quant.scheme import Strict

MANIFEST = "dite_manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16_000_000
MAX_HEADER_BYTES = 100_000_000
HARMLESS = (".md", ".png", ".jpg", ".gitattributes")  # what people add to a model's folder, and no loader reads; hidden files too
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class FileEntry(Strict):
    """Size and SHA-256 of one file."""

    size: int
    sha256: str


class Manifest(Strict):
    """`dite_manifest.json`: every other file of the folder, by its path inside it."""

    format_version: int
    dite_version: str
    files: dict[str, FileEntry]


def verify_folder(folder: Path) -> Manifest:
    """Check a saved folder against its manifest. Raises CheckpointError that names the file."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = regular_file(folder, name)
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{name} is damaged", f"it has {size} bytes, the manifest says {entry.size}", "copy or download the folder again")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    unlisted = sorted(name for name in found - {*manifest.files, MANIFEST} if not (name.startswith(".") or name.lower().endswith(HARMLESS)))
    if unlisted:
        raise CheckpointError(
            f"{unlisted[0]} is not in the manifest", "a loader could read it unchecked", "remove the file, or save the model again with dite.save"
        )
    for name in manifest.files:
        if name.endswith(".safetensors"):
            read_header(folder / name)
    for name, entry in manifest.files.items():
        if file_digest(folder / name) != entry.sha256:
            raise CheckpointError(f"{name} is damaged", "its SHA-256 is not the manifest's", "copy or download the folder again")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The parsed manifest of `folder`."""
    path = regular_file(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{MANIFEST} is too large", f"{path.stat().st_size} bytes; at most {MAX_MANIFEST_BYTES} are read", "save the model again"
        )
    try:
        manifest = Manifest.model_validate(json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{MANIFEST} can't be read", str(error).splitlines()[0], "save the model again") from error
    if manifest.format_version > FORMAT_VERSION:
        raise CheckpointError(
            "the folder is from a newer dite", f"format {manifest.format_version}; this dite {FORMAT_VERSION} at most", "upgrade dite"
        )
    return manifest


def regular_file(folder: Path, name: str) -> Path:
    """`folder/name`, if it is a regular file inside the folder, reached through no link."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ".." in parts:
        raise CheckpointError(f"the manifest lists {name!r}", "paths must stay inside the folder", "don't load this folder")
    path = folder
    for part in parts:
        path = path / part
        try:
            mode = os.lstat(path).st_mode
        except OSError as error:
            raise CheckpointError(f"{name} is missing", "the manifest lists it", "copy or download the folder again") from error
        if stat.S_ISLNK(mode):
            raise CheckpointError(f"{name} is a link", "a saved model holds regular files only", "copy the folder with links resolved")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{name} is not a regular file", "pipes, devices and folders can't be loaded", "don't load this folder")
    return path


def read_header(file: Path) -> dict[str, dict]:
    """The tensor entries of a safetensors file, checked: unique names, known dtypes, sizes that fit shapes, no gap, no overlap."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _bad(file, "it is not a regular file")
    size = status.st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _bad(file, f"its header claims {length} bytes of the file's {size}")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise _bad(file, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad(file, "its header is not a mapping")
    header.pop("__metadata__", None)
    end = 0
    for name, begin, stop in sorted(((name, *_extent(file, name, entry)) for name, entry in header.items()), key=lambda item: item[1:]):
        if begin != end:
            raise _bad(file, f"tensor {name!r} begins at {begin}, the one before ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise _bad(file, f"its tensors end at {8 + length + end}, the file at {size}")
    return header


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _extent(file: Path, name: str, entry: object) -> tuple[int, int]:
    try:
        (begin, stop), shape, width = entry["data_offsets"], entry["shape"], ITEM_BYTES[entry["dtype"]]
        numbers = [begin, stop, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise _bad(file, f"tensor {name!r} has no valid dtype, shape and offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _bad(file, f"tensor {name!r} has a size that is not a whole number")
    if stop - begin != width * math.prod(shape):
        raise _bad(file, f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} can't take {stop - begin} bytes")
    return begin, stop


def _bad(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is not a sound safetensors file", why, "copy or download it again")


def _no_duplicates(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    repeated = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
    if repeated is not None:
        raise ValueError(f"key {repeated!r} appears twice")
    return dict(pairs)
