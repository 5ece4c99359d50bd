"""Which model a figure is of: a digest of its weights and configuration, and the dtype that it computes in."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dite.models.access import the_denoiser


def model_digest(pipe: Any) -> str:
    """SHA-256 over every weight and configuration of a pipeline, its classes among them: where it was loaded from doesn't matter."""
    own = {key: value for key, value in dict(pipe.config).items() if key not in pipe.components and not key.startswith("_")}
    digest = hashlib.sha256(f"{type(pipe).__name__} {json.dumps(own, sort_keys=True, default=_as_json)}".encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__} {json.dumps(_config_of(part), sort_keys=True, default=_as_json)}".encode())
        if isinstance(part, torch.nn.Module):
            for key, value in plain_tensors(part.state_dict()):
                digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of a state dict in order of their names. One of a class of its own (torchao's codes with their scales, say) has no bytes to look
    at: it is taken apart into `name.part`s."""
    for key, value in sorted(state.items()):
        if hasattr(value, "__tensor_flatten__"):
            yield from plain_tensors({f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]})
        else:
            yield key, value


def dtype_name(pipe: Any) -> str:
    """`float32` and the like: the dtype that the denoiser computes in."""
    return str(the_denoiser(pipe).dtype).removeprefix("torch.")


def _config_of(part: Any) -> dict[str, Any]:
    config = getattr(part, "config", None) or {}
    return {key: value for key, value in dict(config.to_dict() if hasattr(config, "to_dict") else config).items() if key != "_name_or_path"}


def _as_json(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)
