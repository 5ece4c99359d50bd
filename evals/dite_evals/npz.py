"""Arrays in `.npz` files, read without pickle and without trust: a header is believed only as far as the bytes behind it go.

numpy's own loader is left out on purpose: it reads a whole array before anybody can ask how large it is. Here headers come first, object
arrays are refused, and image arrays are read a few rows at a time.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from dite.errors import CheckpointError
from dite.outputs import write_file

SUFFIX = ".npy"
MOST_BYTES = 8192**2 * 8  # a covariance of 8192 features
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
UNREADABLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Header:
    """What a member says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_headers(path: Path) -> dict[str, Header]:
    """Array name → header of every array in the file. Raises CheckpointError unless each is a plain array of the size its member has."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(SUFFIX)]
            return {name.removesuffix(SUFFIX): _header_of(archive, name, path) for name in names}
    except UNREADABLE as error:
        raise _damaged(path, str(error)) from error


def read_array(path: Path, name: str, most_bytes: int = MOST_BYTES) -> np.ndarray:
    """One array, of at most `most_bytes`."""
    try:
        with zipfile.ZipFile(path) as archive:
            header = _header_of(archive, name + SUFFIX, path)
            if header.num_bytes > most_bytes:
                raise _damaged(path, f"{name} holds {header.num_bytes} bytes, {most_bytes} are the most")
            with archive.open(name + SUFFIX) as member:
                return npy.read_array(member, allow_pickle=False)
    except UNREADABLE as error:
        raise _damaged(path, str(error)) from error


def read_rows(path: Path, name: str, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """`array[i]` for each i in `wanted`, which ascend: one pass over the file, one row in memory."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name + SUFFIX) as member:
            header = _header(member)
            row_bytes = header.num_bytes // max(1, header.shape[0])
            at = 0
            for index in wanted:
                _skip(member, (index - at) * row_bytes)
                yield np.frombuffer(_exactly(member, row_bytes), header.dtype).reshape(header.shape[1:])
                at = index + 1
    except UNREADABLE as error:
        raise _damaged(path, str(error)) from error


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write atomically: a temporary file beside it, then a rename."""
    with io.BytesIO() as buffer:
        np.savez(buffer, **arrays)
        write_file(path, buffer.getvalue())


def _header_of(archive: zipfile.ZipFile, name: str, path: Path) -> Header:
    with archive.open(name) as member:
        header = _header(member)
        size = archive.getinfo(name).file_size
        if header.dtype.hasobject:
            raise _damaged(path, f"{name} holds Python objects, which only pickle can read")
        if member.tell() + header.num_bytes != size:
            behind = size - member.tell()
            raise _damaged(path, f"{name} says {header.dtype}{list(header.shape)}, {header.num_bytes} bytes, and has {behind}")
    return header


def _header(member: IO[bytes]) -> Header:
    version = npy.read_magic(member)
    if version not in READERS:
        raise ValueError(f"arrays of format {version} are not read")
    shape, fortran, dtype = READERS[version](member)
    return Header(shape, dtype, fortran)


def _skip(member: IO[bytes], num_bytes: int) -> None:
    while num_bytes:
        num_bytes -= len(_exactly(member, min(num_bytes, 2**20)))


def _exactly(member: IO[bytes], num_bytes: int) -> bytes:
    data = member.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError(f"it ends {num_bytes - len(data)} bytes too early")
    return data


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"can't read {path}", why, "give an .npz written by numpy.savez, of plain arrays")
