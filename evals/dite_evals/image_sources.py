"""Where reference images come from: a folder of pictures, parquet in Hugging Face's image layout, or ADM's `.npz`.

    folder     every .png, .jpg, .jpeg and .webp below it, in order of their paths
    parquet    a file, or the *.parquet files of a folder: one column of `{bytes, path}` structs or of bytes
    .npz       one array uint8 [N, H, W, 3]: `arr_0`, or the only one of that kind

Of `n` images from a larger source every (count / n)-th is taken, so that a folder sorted by class still gives all classes. H × W pixels.
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dite.errors import CheckpointError, UnsupportedEnvironment, UsageError, did_you_mean
from dite_evals import npz

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
FORMATS = ("PNG", "JPEG", "WEBP")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # the others have more than 8 bits, which a conversion would clip
MOST_PIXELS = 64 * 2**20
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
ROWS = 256


class ImageSource(ABC):
    """`count` images under a `name` that says nothing of the machine."""

    name: str
    count: int

    @abstractmethod
    def read(self, wanted: Sequence[int]) -> Iterator[tuple[str, Image.Image]]:
        """The images of ascending indices, as RGB, each with words that say where it lies."""


def open_images(path: str | os.PathLike[str], split: str | None = None) -> ImageSource:
    """The images at `path`; `split` chooses among the splits of a parquet folder. Raises UsageError when there are none."""
    path = Path(path)
    parquets = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" and path.is_file() else []
    if split is not None and not parquets:
        raise UsageError("a split goes with parquet files", f"{path} holds none", "leave --split out")
    if parquets:
        return ParquetSource(_of_split(path, parquets, split), f"{path.resolve().name} {split}" if split else path.resolve().name)
    if path.is_dir():
        return FolderSource(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzSource(path)
    why = "it is neither a folder, nor a .parquet or .npz file" if path.exists() else "it does not exist"
    raise UsageError(f"no images at {path}", why, "give a folder of pictures, a .parquet file or folder, or an .npz")


def chosen(count: int, n: int | None) -> list[int]:
    """Indices of `n` images out of `count`, evenly spaced; all of them for None.

    >>> chosen(10, 4)
    [0, 2, 5, 7]
    """
    n = count if n is None else n
    if n > count:
        raise UsageError("there are too few images", f"{n} are wanted, the source has {count}", f"use --n {count} or less")
    return [index * count // n for index in range(n)]


def read_batches(source: ImageSource, wanted: Sequence[int], batch_size: int, image_size: int | None = None) -> Iterator[torch.Tensor]:
    """uint8 [B, 3, H, W], B = `batch_size` but for the last. With `image_size`, of each its middle square at that size (`centre_square`).

    Raises UsageError when two images differ in size.
    """
    pending: list[torch.Tensor] = []
    first: tuple[int, int] | None = None
    for where, image in source.read(wanted):
        image = image if image_size is None else centre_square(image, image_size)
        first = first or image.size
        if image.size != first:
            raise UsageError(
                "these images differ in size",
                f"{where} has {image.size[0]}×{image.size[1]} pixels, those before it {first[0]}×{first[1]}",
                f"--image-size {min(first)} takes the middle square of each at that size",
            )
        pending.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if len(pending) == batch_size:
            yield torch.stack(pending)
            pending = []
    if pending:
        yield torch.stack(pending)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square at `size` × `size`, as the ImageNet models of ADM and DiT were trained on: halved by box averages while that leaves
    at least `size`, then bicubic, then cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class FolderSource(ImageSource):
    """Pictures below a folder; links to folders are not followed."""

    def __init__(self, folder: Path):
        found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
        self.files = sorted((path for path in found if path.suffix.lower() in SUFFIXES), key=lambda path: path.relative_to(folder).as_posix())
        if not self.files:
            raise UsageError(f"no images in {folder}", f"nothing below it ends in {', '.join(sorted(SUFFIXES))}, or is parquet", "check the path")
        self.name, self.count = folder.resolve().name, len(self.files)

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[str, Image.Image]]:
        for index in wanted:
            yield str(self.files[index]), _decode(self.files[index], str(self.files[index]))


class ParquetSource(ImageSource):
    """Encoded images in one column of parquet files, read a few hundred rows at a time."""

    def __init__(self, files: Sequence[Path], name: str):
        self.parquet = _pyarrow_parquet()
        self.files, self.name = list(files), name
        self.counts = [self._open(file).metadata.num_rows for file in self.files]
        self.count = sum(self.counts)
        self.column = _image_column(self._open(self.files[0]).schema_arrow, self.files[0])
        if not self.count:
            raise UsageError(f"no images in {self.files[0].parent}", "its parquet files have no rows", "check the path")

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[str, Image.Image]]:
        before = 0
        for file, count in zip(self.files, self.counts, strict=True):
            here = [index - before for index in wanted[bisect_left(wanted, before) : bisect_left(wanted, before + count)]]
            for index, data in zip(here, self._rows(file, set(here)), strict=True):
                yield f"row {index} of {file}", _decode(data, f"row {index} of {file}")
            before += count

    def _rows(self, file: Path, wanted: set[int]) -> Iterator[bytes]:
        at = 0
        try:
            for batch in self._open(file).iter_batches(ROWS, columns=[self.column]):
                yield from (_bytes_of(batch[0][row].as_py(), at + row, file) for row in range(len(batch)) if at + row in wanted)
                at += len(batch)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own are ValueErrors
            raise CheckpointError(f"can't read {file}", str(error).splitlines()[0], "download it again") from error

    def _open(self, file: Path) -> Any:
        try:
            return self.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"can't read {file}", str(error).splitlines()[0], "download it again") from error


class NpzSource(ImageSource):
    """ADM's sample and reference batches: images as one array [N, H, W, 3]."""

    def __init__(self, path: Path):
        headers = npz.read_headers(path)
        fitting = [name for name, header in headers.items() if header.dtype == np.uint8 and len(header.shape) == 4 and header.shape[3] == 3]
        names = [name for name in fitting if name == "arr_0"] or fitting
        held = ", ".join(f"{name} {header.dtype}{list(header.shape)}" for name, header in headers.items()) or "nothing"
        if len(names) != 1 or headers[names[0]].fortran or 0 in headers[names[0]].shape:
            hint = "save them with numpy.savez(FILE, images), uint8 [N, H, W, 3] in C order"
            raise UsageError(f"{path} holds no images", f"one array uint8 [N, H, W, 3] is expected, it holds {held}", hint)
        self.path, self.array = path, names[0]
        self.name, self.count = path.stem, headers[names[0]].shape[0]

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[str, Image.Image]]:
        for index, row in zip(wanted, npz.read_rows(self.path, self.array, wanted), strict=True):
            yield f"image {index} of {self.path}", Image.fromarray(row)


def _of_split(path: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """The files of one split, which their names tell: `train-00000-of-00001.parquet`. Never two of them together."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = SHARD.fullmatch(file.stem)
        splits.setdefault(match[1] if match else file.stem, []).append(file)
    if split is None and (len(splits) == 1 or not any(SHARD.fullmatch(file.stem) for file in files)):
        return list(files)
    if split not in splits:
        what = f"{path} has no split {split}" if split else f"{path} has more than one split"
        hint = did_you_mean(split or "", splits) or f"use --split {next(iter(splits))}"
        raise UsageError(what, f"it has {', '.join(sorted(splits))}", hint)
    return splits[split]


def _image_column(schema: Any, file: Path) -> str:
    types = import_module("pyarrow.types")

    def holds_images(kind: Any) -> bool:
        inside = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return types.is_binary(inside) or types.is_large_binary(inside)

    names = [field.name for field in schema if holds_images(field.type)]
    if len(names) != 1:
        why = f"one column of {{bytes, path}} or of bytes is expected, it has {', '.join(names) or 'none'} among {', '.join(schema.names)}"
        raise UsageError(f"{file} holds no images, or more than one a row", why, "write one with the images alone")
    return names[0]


def _bytes_of(value: Any, row: int, file: Path) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise CheckpointError(f"row {row} of {file} has no image", "its bytes are empty, and paths are not followed", "embed the images in the file")
    return data


def _decode(source: Path | bytes, where: str) -> Image.Image:
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width}×{image.height} pixels, {MOST_PIXELS} are the most")
            if image.mode not in MODES:
                raise ValueError(f"its pixels are of kind {image.mode}, expected 8 bits a channel")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"can't read the image {where}", str(error), "replace it or take it away") from error


def _pyarrow_parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise UnsupportedEnvironment("parquet can't be read here", f"pyarrow is missing or broken ({error})", "pip install pyarrow") from error
