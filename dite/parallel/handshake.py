"""Before any job, ranks tell each other what they are; one that differs ends it, by name of what differs."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import torch
from torch import nn

import dite
from dite.errors import RanksDisagree
from dite_kernels import residual

SAMPLED_VALUES = 64


def description(model: nn.Module) -> dict[str, Any]:
    """What must be the same on every rank: versions, who decodes, the model's configuration, its layers with their bits, and some of their values."""
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    layout, values = hashlib.sha256(), 0
    for name, tensor in sorted(model.state_dict().items()):
        layout.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        part = tensor.detach().flatten()[:SAMPLED_VALUES].float().cpu().contiguous()
        values = zlib.crc32(part.numpy().tobytes(), values)
    return {
        "dite": dite.__version__,
        "torch": torch.__version__,
        "codec implementation": residual.implementation(),
        "model": type(model).__name__,
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "layers and bits": layout.hexdigest()[:16],
        "weights": f"{values:08x}",
    }


def shake_hands(group: Any, mine: dict[str, Any]) -> None:
    """Compare with all ranks. Raises RanksDisagree on every one of them alike."""
    everyone = group.gather_json(mine)
    for rank, other in enumerate(everyone):
        wrong = sorted(key for key in {*everyone[0], *other} if everyone[0].get(key) != other.get(key))
        if wrong:
            key = wrong[0]
            raise RanksDisagree(
                f"rank {rank} and rank 0 were started with different {', '.join(wrong)}",
                f"{key}: {other.get(key)} on rank {rank}, {everyone[0].get(key)} on rank 0",
                "start all ranks with the same command, files and versions",
            )
