"""Upstream checkpoints (`.pt`: a pickle) as something that can be loaded without trust: a diffusers folder, or a safetensors file."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dite.checkpoint.header import read_header
from dite.checkpoint.upstream_dit import config_of, is_upstream_dit, renamed
from dite.errors import CheckpointError, OutputExists, UsageError

TRUST = "torch's reader for weights only, in a process of its own; no other code that the file names is run"
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Limits:
    """What a checkpoint may be, and what reading it may take."""

    file_bytes: int = 64 * 10**9
    tensors: int = 20_000
    memory_bytes: int | None = None  # None: three times the file, and 8 GB for torch itself
    seconds: int = 1800


def convert(source: Path, output: Path, *, num_heads: int | None = None, limits: Limits | None = None) -> dict[str, Any]:
    """Write what `source` holds as `output`: a `.safetensors` file, or a folder for a model that is recognised (DiT). Returns what was done.

    Raises UsageError for a source or an output that can't be, OutputExists, CheckpointError when the file holds no state dict or breaks a limit.
    """
    limits = limits or Limits()
    size = _checked(source, output, limits)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".convert-") as folder:
        plain = Path(folder) / "plain.safetensors"
        answer = _read_apart(source, plain, limits, limits.memory_bytes or 3 * size + 8 * 10**9)
        read_header(plain)
        document = {"output": str(output), "tensors": answer["tensors"], "taken_from": answer["from"], "trusts": TRUST}
        if output.suffix == ".safetensors":
            os.replace(plain, output)
            return document | {"model_class": None}
        return document | {"model_class": _save_model(plain, output, num_heads)}


def _checked(source: Path, output: Path, limits: Limits) -> int:
    if not source.is_file():
        raise UsageError(f"no file {source}", "dite convert takes one checkpoint file", "check the path")
    if source.suffix not in SUFFIXES:
        raise UsageError(f"{source.name} is no upstream checkpoint", f"they end in {', '.join(SUFFIXES)}", "safetensors files need no conversion")
    size = source.stat().st_size
    if size > limits.file_bytes:
        raise CheckpointError(f"{source.name} is too large", f"{size} bytes; at most {limits.file_bytes} are read", "raise --max-bytes")
    if os.path.lexists(output):
        raise OutputExists(f"{output} exists already", "nothing is overwritten", "choose another -o")
    return size


def _read_apart(source: Path, plain: Path, limits: Limits, memory_bytes: int) -> dict[str, Any]:
    """Run the reader in a process of its own and return its answer."""
    numbers = [str(number) for number in (limits.tensors, memory_bytes, limits.seconds)]
    command = [sys.executable, "-m", "dite.checkpoint.pickle_reader", str(source.absolute()), str(plain), *numbers]
    hint = "is it a state dict, saved by torch.save?"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limits.seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{source.name} takes too long to read", f"more than {limits.seconds} s", "raise --max-seconds") from error
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        why = f"its reader ended with status {done.returncode} within {memory_bytes} bytes of memory: {last[:200]}"
        raise CheckpointError(f"{source.name} can't be read", why, hint) from None
    if "error" in answer:
        raise CheckpointError(f"{source.name} can't be read", answer["error"], hint)
    return answer


def _save_model(plain: Path, output: Path, num_heads: int | None) -> str:
    """Build the model whose state dict this is, fill and save it; returns its class's name."""
    from diffusers import DiTTransformer2DModel
    from safetensors.torch import load_file

    from dite.checkpoint.save import save

    tensors = load_file(plain)
    if not is_upstream_dit(tensors):
        why = f"its tensors are called {', '.join(sorted(tensors)[:3])} …; those of a DiT begin with blocks., x_embedder., y_embedder., final_layer."
        raise CheckpointError("this is no model that dite convert knows", why, "give -o FILE.safetensors for its plain state dict")
    config = config_of(tensors, num_heads)
    model = DiTTransformer2DModel(**config).eval()
    try:
        model.load_state_dict(renamed(tensors, config["num_layers"]))
    except RuntimeError as error:
        raise CheckpointError("the tensors don't make up a DiT", " ".join(str(error).split())[:300], "is the file complete?") from error
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    save(model.to(dtypes.pop()) if len(dtypes) == 1 else model, output)
    return type(model).__name__
