"""The one place that reads a pickle: `python -m dite.checkpoint.pickle_reader SOURCE OUT`, in a process of its own that `dite convert` starts.

torch's reader for weights only builds tensors, containers and numbers, and calls nothing else that a pickle names; that reader is what is trusted.
In case it is wrong, this process may take only so much memory, time and disk, and its parent reads nothing from it but a safetensors file, checked.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

WRAPPERS = ("state_dict", "model", "ema", "model_state_dict", "module")  # what training scripts wrap a state dict in; `ema` is what is sampled from
PREFERRED = "ema"


def main(arguments: list[str]) -> int:
    """Read, check, write; answers on stdout in JSON."""
    source, out, max_tensors, max_bytes, seconds = arguments[0], arguments[1], *map(int, arguments[2:5])
    _limit(max_bytes, seconds)
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        where, tensors = state_dict_of(loaded)
        if len(tensors) > max_tensors:
            raise ValueError(f"it holds {len(tensors)} tensors; at most {max_tensors} are taken")
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, out, {"format": "pt"})
    except MemoryError:
        return _answer({"error": f"it needs more than {max_bytes} bytes of memory"})
    except Exception as error:  # whatever the reader raises on what it doesn't take
        return _answer({"error": " ".join(str(error).split())[:300] or type(error).__name__})
    return _answer({"tensors": len(tensors), "from": where})


def state_dict_of(loaded: Any) -> tuple[str, dict[str, Any]]:
    """The mapping of names to tensors in what was read, and under which keys it lay. Raises ValueError."""
    import torch

    where: list[str] = []
    while isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inside = [key for key in (PREFERRED, *WRAPPERS) if isinstance(loaded.get(key), Mapping)]
        if not inside:
            raise ValueError(f"no tensors, and none of {', '.join(WRAPPERS)}, among its keys")
        where.append(inside[0])
        loaded = loaded[inside[0]]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a state dict")
    wrong = next((str(name) for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))), None)
    if wrong is not None:
        raise ValueError(f"{wrong[:80]} is no tensor")
    return ".".join(where), dict(loaded)


def _limit(max_bytes: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the time limit of the parent stays
        return
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(document: dict[str, Any]) -> int:
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
