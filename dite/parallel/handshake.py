"""Before any job, ranks tell each other what they are; one that differs ends it, by name of what differs.

Before each call of the model they tell each other which call it is, in 24 bytes: after that every rank knows the length of every packet to come.
(gloo ends the process when a message is longer than its receiver expects.)
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import Any

import torch
from torch import nn

import dite
from dite.errors import RanksDisagree
from dite.parallel.stream import Moment
from dite_kernels import residual

SAMPLED_VALUES = 64
_CALL = struct.Struct("<IIIIII")
_MAGIC = int.from_bytes(b"DTC1", "little")


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


def agree_on_call(group: Any, moment: Moment, layout: int) -> None:
    """Compare which call this is: of which request and branch, which step, with tensors of which shapes (`layout`) and values (checksums). Raises
    RanksDisagree on every rank alike."""
    call = (_MAGIC, moment.epoch, moment.branch, moment.step, layout, moment.inputs)
    everyone = [_CALL.unpack(bytes(one.numpy())) for one in group.all_gather(group.bytes_of(_CALL.pack(*call)))]
    for rank, other in zip(group.members, everyone, strict=True):
        if other == everyone[0]:
            continue
        if other[:-1] == everyone[0][:-1]:
            told = f"their checksums at step {moment.step} are {other[-1]:08x} and {everyone[0][-1]:08x}"
            hint = "give all ranks the same seed, as generator=torch.Generator().manual_seed(0), and the same conditions"
            raise RanksDisagree(f"rank {rank} called the model with other inputs than rank {group.members[0]}", told, hint)
        names = ("message", "request", "guidance branch", "step", "shapes")
        wrong = ", ".join(name for name, got, wanted in zip(names, other, everyone[0], strict=False) if got != wanted)
        told = f"at {moment}, their {wrong} differ"
        raise RanksDisagree(f"rank {rank} is at another call of the model than rank {group.members[0]}", told, "run the same script on all ranks")
