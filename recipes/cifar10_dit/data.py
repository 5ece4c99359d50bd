"""CIFAR-10 in Hugging Face's parquet layout (`img: {bytes, path}`, `label`) as uint8 tensors."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image


class Split(NamedTuple):
    """One split: `images` uint8 [N, 3, H, W], `labels` int64 [N], `names` the class names in order of their ids."""

    images: torch.Tensor
    labels: torch.Tensor
    names: list[str]


def load_split(folder: Path, split: str) -> Split:
    """Read every `{split}-*.parquet` of `folder`. Raises FileNotFoundError when there is none."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}-*.parquet in {folder}; --data takes a folder in Hugging Face's parquet layout")
    pixels, labels, names = [], [], []
    for file in files:
        table = parquet.read_table(file)
        pixels += [_decode(row["bytes"]) for row in table.column("img").to_pylist()]
        labels += table.column("label").to_pylist()
        names = names or _class_names(table.schema.metadata or {})
    names = names or [str(label) for label in range(max(labels) + 1)]
    return Split(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), names)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 [.., 3, H, W] to fp32 in [-1, 1], the range of diffusers' autoencoders."""
    return images.float() / 127.5 - 1


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get("label", {}).get("names", [])
