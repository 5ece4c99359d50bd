"""What a module holds in memory: its weights, and whatever was prepared from them and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dite_evals.peer_calls import plain_tensors


def stored_bytes(module: nn.Module) -> int:
    """Of everything in the state dict, as it is."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in plain_tensors(module.state_dict()))


def held_bytes(module: nn.Module) -> int:
    """Of every tensor that the module or a part of it reaches through attributes, each memory counted once.

    A backend may keep a weight unpacked or in another order beside the packed one: that counts here, and not in `stored_bytes`.
    """
    seen: set[int] = set()
    storages = {}
    for part in module.modules():
        for tensor in _tensors(vars(part), seen):
            for _, plain in plain_tensors({"": tensor}):
                storages[plain.untyped_storage().data_ptr()] = plain.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, str | bytes | int | float | type | None) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        return  # a part of its own
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value), seen)
