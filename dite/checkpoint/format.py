"""Which files a saved folder holds: pure checks, no tensors, no torch. This is the boundary that hostile folders meet.

Order: every listed file is a regular file inside the folder, with one name, and has its size; the manifest is strict; each safetensors header agrees
with its file (`header.py`); digests agree. Then what the folder says of itself is checked (`index.py`, `structure.py`), and only then is
anything allocated.
"""

import hashlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError

from dite.checkpoint.header import read_header
from dite.checkpoint.strict_json import blob_of, read_strict
from dite.errors import CheckpointError
from dite.quant.scheme import Strict

MANIFEST, PIPELINE = "dite_manifest.json", "model_index.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16_000_000
HARMLESS = (".md", ".png", ".jpg", ".gitattributes")  # what people add to a model's folder, and no loader reads
CODE = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack", ".onnx", ".gguf")
READ = (".json", ".safetensors", ".txt", ".model", ".jinja")  # what loaders read
TEMPLATES = "additional_chat_templates"  # where transformers looks for more of a tokenizer's files


class FileEntry(Strict):
    """Size and SHA-256 of one file."""

    model_config = ConfigDict(strict=True)

    size: Annotated[int, Field(ge=0, le=2**60)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(Strict):
    """`dite_manifest.json`: every other file of the folder, by its path inside it. `dite_version` only tells who wrote it."""

    model_config = ConfigDict(strict=True)

    format_version: Annotated[int, Field(ge=1)]
    dite_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9A-Za-z.+-]{1,40}$")]
    files: Annotated[dict[str, FileEntry], Field(min_length=1)]


def verify_folder(folder: Path) -> Manifest:
    """Check a saved folder against its manifest. Raises CheckpointError that names the file."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if name.lower().endswith(CODE):
            raise CheckpointError(
                f"the manifest lists {name}", "a saved model holds numbers and texts, no code and no pickles", "don't load this folder"
            )
        path = regular_file(folder, name)
        status = path.stat()
        if status.st_size != entry.size:
            why = f"it has {status.st_size} bytes, the manifest says {entry.size}"
            raise CheckpointError(f"{name} is damaged", why, "copy or download the folder again")
        if status.st_nlink > 1:
            why = f"it has {status.st_nlink} names: who writes to another of them changes the model"
            raise CheckpointError(f"{name} is a hard link", why, "copy the folder with cp -r")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    unlisted = sorted(name for name in found - {*manifest.files, MANIFEST} if not _harmless(name))
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


def check_folder(folder: Path) -> bool:
    """Whether `folder` has a manifest, which then holds; without one, its files are at least regular files of its own.

    Links into the hub's cache are let through where there is no manifest: its snapshots consist of them.
    """
    if os.path.lexists(folder / MANIFEST):
        verify_folder(folder)
        return True
    folder = folder.absolute()
    _own_files(folder, folder)
    for part in component_names(folder):
        for name in (part, f"{part}/{TEMPLATES}"):
            if os.path.lexists(folder / name):
                if stat.S_ISLNK(os.lstat(folder / name).st_mode):
                    raise CheckpointError(f"{name} is a link", "a model's files lie in its own folder", "copy the folder with links resolved")
                _own_files(folder, folder / name)
    return False


def component_names(folder: Path) -> list[str]:
    """The parts that a pipeline's index names, each a folder in `folder`; none for a bare model."""
    if not (folder / PIPELINE).is_file():
        return []
    names = [name for name, value in read_strict(folder / PIPELINE, PIPELINE).items() if isinstance(value, list)]
    wrong = next((name for name in names if not name.isidentifier()), None)
    if wrong is not None:
        raise CheckpointError(
            f"{PIPELINE} names a part {wrong!r}", "parts are folders inside this one, named like variables", "don't load this folder"
        )
    return names


def _harmless(name: str) -> bool:
    """Whether a file that the manifest doesn't list is none that a loader could read: some find files by their endings, hidden or not.

    Nobody enters hidden folders (`.git`, `.cache` of the hub's client).
    """
    if name.startswith("."):
        return "/" in name or not name.lower().endswith((*READ, *CODE))
    return name.lower().endswith(HARMLESS)


def _own_files(folder: Path, place: Path) -> None:
    if not place.is_dir():
        raise CheckpointError(f"{place.name} is not a folder", f"{PIPELINE} names it as a part", "copy or download the folder again")
    for path in place.iterdir():
        name, mode = path.relative_to(folder).as_posix(), os.lstat(path).st_mode
        if not path.name.endswith(READ):
            continue
        if stat.S_ISLNK(mode):
            target = blob_of(path)
            if target is None:
                raise CheckpointError(f"{name} is a link", "a model's files lie in its own folder", "copy the folder with links resolved")
            mode = target.stat().st_mode if target.exists() else 0
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{name} is not a regular file", "pipes, devices and folders can't be loaded", "don't load this folder")


def read_manifest(folder: Path) -> Manifest:
    """The parsed manifest of `folder`."""
    values = read_strict(regular_file(folder, MANIFEST), MANIFEST, MAX_MANIFEST_BYTES)
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:  # before the rest: a newer format may have other keys
        raise CheckpointError("the folder is from a newer dite", f"format_version {version}; this dite {FORMAT_VERSION} at most", "upgrade dite")
    for name in values["files"] if isinstance(values.get("files"), dict) else ():
        parts_of(name)
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{MANIFEST} can't be read", f"{where}: {first['msg']}", "save the model again") from error


def regular_file(folder: Path, name: str) -> Path:
    """`folder/name`, if it is a regular file inside the folder, reached through no link."""
    parts, path = parts_of(name), folder
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


def parts_of(name: str) -> tuple[str, ...]:
    """The steps from the folder to one of its files, if `name` is spelled plainly and stays inside."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or name.startswith("/") or "\\" in name or "\0" in name or ".." in parts:
        raise CheckpointError(f"the manifest lists {name!r}", "paths must stay inside the folder", "don't load this folder")
    return parts


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
