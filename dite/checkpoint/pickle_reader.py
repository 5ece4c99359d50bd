"""The one place that reads a pickle: `python -m dite.checkpoint.pickle_reader SOURCE OUT`, in a process of its own that `dite convert` starts.

torch's reader for weights only builds tensors, containers and numbers, and calls nothing else that a pickle names; that reader is what is trusted.
In case it is wrong, this process may take only so much memory, time and disk, and its parent reads nothing from it but a safetensors file, checked.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

WRAPPERS = ("ema", "state_dict", "model", "model_state_dict", "module")  # what training scripts wrap a state dict in; `ema` is what is sampled from
DEEPEST = 3  # wrappers in wrappers, as state_dict.model.module; a dict may hold itself, which has no end
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Read, check, write; answers on stdout in JSON."""
    source, out, max_tensors, max_bytes, seconds, parent = arguments[0], arguments[1], *map(int, arguments[2:6])
    _die_with(parent)
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
    """The mapping of names to tensors in what was read, and under which keys it lay. Raises ValueError.

    A wrapper counts where it leads to tensors; what lies beside it (a step, an optimizer) is left out.
    """
    import torch

    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a state dict")
    # Weights have dimensions: {"ema": {"decay": tensor(0.999)}} is an average's settings, not the average.
    path = next((found for least in (1, 0) if (found := _way(loaded, least)) is not None), None)
    if path is None:
        raise ValueError(f"no tensors among its keys, nor under {', '.join(WRAPPERS)}, at most {DEEPEST} deep")
    for key in path:
        loaded = loaded[key]
    wrong = next((str(name) for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))), None)
    if wrong is not None:
        raise ValueError(f"{'.'.join((*path, wrong[:80]))} is no tensor")
    return ".".join(path), dict(loaded)


def _way(level: Mapping[Any, Any], least: int, path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The keys, from outside in, under which tensors of at least `least` dimensions lie; None where there are none."""
    import torch

    for key in WRAPPERS if len(path) < DEEPEST else ():
        inside = level.get(key)
        if isinstance(inside, Mapping) and (found := _way(inside, least, (*path, key))) is not None:
            return found
    return path if any(isinstance(value, torch.Tensor) and value.dim() >= least for value in level.values()) else None


def _die_with(parent: int) -> None:
    """Have the kernel end this process with the one that waits for it, however that goes: the next run removes what was half written."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


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
