"""The arguments of one call of a model: cut into rows of the batch, and told apart by checksums."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

SAMPLED = 4096


def cut(value: Any, count: int, first: int, last: int) -> Any:
    """Rows first..last−1 of every tensor with `count` rows in `value`, mappings entered; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: cut(one, count, first, last) for name, one in value.items()}
    return value[first:last] if isinstance(value, torch.Tensor) and value.ndim and len(value) == count else value


def checksum(arguments: Mapping[str, Any]) -> int:
    """Of some of the values of every tensor that the model is called with."""
    crc = 0
    for name, value in sorted(arguments.items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().flatten()
            part = flat[:: max(1, len(flat) // SAMPLED)].float().cpu().contiguous()
            crc = zlib.crc32(part.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def layout(arguments: Mapping[str, Any]) -> int:
    """A checksum of the names, shapes and dtypes of the same."""
    parts = [f"{name} {value.dtype} {list(value.shape)}" for name, value in sorted(arguments.items()) if isinstance(value, torch.Tensor)]
    return zlib.crc32(";".join(parts).encode())
