"""Weights of extractors: read from safetensors only, compared with the architecture key by key, identified by their values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dite.errors import CheckpointError, UsageError

PICKLES = {".pth", ".pt", ".bin", ".ckpt", ".pkl"}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


def read_weights(path: Path, hint: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. A pickle is never opened: loading one runs what it says. Raises UsageError or CheckpointError."""
    if path.is_file() and (path.suffix in PICKLES or _starts_as_pickle(path)):
        raise UsageError(
            f"{path} is a pickle",
            "loading a pickle can run code that is hidden in it, so dite reads safetensors only",
            f"dite convert {path.name} -o {path.stem}.safetensors",
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read {path}", str(error), hint) from error


def fit_(network: nn.Module, state: Mapping[str, torch.Tensor], path: Path, hint: str) -> None:
    """Load `state` into `network` in place, as fp32. Raises CheckpointError that names the first key which is missing, too much, misshapen or
    not finite."""
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items() if not _is_counter(key)}
    found = {key: tuple(value.shape) for key, value in state.items() if not _is_counter(key)}
    if expected != found:
        odd = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise CheckpointError(
            f"{path} doesn't hold this {type(network).__name__}",
            f"{odd[0]} is {found.get(odd[0], 'absent')}, expected {expected.get(odd[0], 'nothing')}; {len(odd)} of {len(expected)} keys are wrong",
            hint,
        )
    damaged = [key for key in found if not state[key].is_floating_point() or not torch.isfinite(state[key]).all()]
    if damaged:
        raise CheckpointError(f"{path} is damaged", f"a weight of {damaged[0]} is not finite, or no floating-point number", hint)
    network.load_state_dict({key: state[key].float() for key in found}, strict=False, assign=True)


def weights_sha256(state: Mapping[str, torch.Tensor], *facts: str) -> str:
    """Hash of the values as fp32, in order of their keys, and of `facts`; how they were stored doesn't matter."""
    digest = hashlib.sha256("\n".join(facts).encode())
    for key in sorted(key for key in state if not _is_counter(key)):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _is_counter(key: str) -> bool:
    """BatchNorm's count of training batches: some conversions keep it, and no feature depends on it."""
    return key.endswith("num_batches_tracked")


def _starts_as_pickle(path: Path) -> bool:
    """For a better word than "damaged". safetensors begin with the length of their header, any eight bytes, and then a brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith(PICKLE_STARTS) and start[8:] != b"{"
