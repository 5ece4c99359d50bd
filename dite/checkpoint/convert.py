"""Upstream checkpoints (`.pt`: a pickle) as something that can be loaded without trust: a diffusers folder, or a safetensors file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dite.checkpoint.header import read_header
from dite.checkpoint.swap import recover, sync
from dite.checkpoint.upstream_dit import is_upstream_dit, model_of
from dite.errors import CheckpointError, DiteError, OutputExists, UsageError
from dite.outputs import OutputLock, check_writable

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

    The output appears whole or not at all. Raises UsageError for a source or an output that can't be, OutputExists, OutputInUse when another run
    writes there, CheckpointError when the file holds no state dict, no whole model for a folder, or breaks a limit.
    """
    limits = limits or Limits()
    size = _checked(source, output, limits)
    memory_bytes = limits.memory_bytes or 3 * size + 8 * 10**9
    with OutputLock(output) as lock:
        if lock.held:
            recover(lock.folder)
        _refuse_existing(output)  # again: another run may have come first
        with _partial_folder(lock.folder) as folder:
            plain = folder / "plain.safetensors"
            answer = _read_apart(source, plain, limits, memory_bytes)
            read_header(plain)
            document = {"output": str(output), "tensors": answer["tensors"], "taken_from": answer["from"], "trusts": TRUST}
            if output.suffix == ".safetensors":
                _publish(plain, output)
                return document | {"model_class": None}
            model = _model(plain, num_heads, memory_bytes)
        from dite.checkpoint.save import save

        save(model, output, lock=lock)
    return document | {"model_class": type(model).__name__}


def _checked(source: Path, output: Path, limits: Limits) -> int:
    if not source.is_file():
        raise UsageError(f"no file {source}", "dite convert takes one checkpoint file", "check the path")
    if source.suffix not in SUFFIXES:
        raise UsageError(f"{source.name} is no upstream checkpoint", f"they end in {', '.join(SUFFIXES)}", "safetensors files need no conversion")
    size = source.stat().st_size
    if size > limits.file_bytes:
        raise CheckpointError(f"{source.name} is too large", f"{size} bytes; at most {limits.file_bytes} are read", "raise --max-bytes")
    _refuse_existing(output)
    check_writable(output.absolute().parent)
    return size


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise OutputExists(f"{output} exists already", "nothing is overwritten", "choose another -o")


@contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` for what is not finished, by the name that `recover` removes when this process can't."""
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_apart(source: Path, plain: Path, limits: Limits, memory_bytes: int) -> dict[str, Any]:
    """Run the reader in a process of its own and return its answer.

    -P, and the variable for what torch may start: else a torch.py that came with the checkpoint, in the current folder, would be run for torch.
    """
    numbers = [str(number) for number in (limits.tensors, memory_bytes, limits.seconds, os.getpid())]
    command = [sys.executable, "-P", "-m", "dite.checkpoint.pickle_reader", str(source.absolute()), str(plain), *numbers]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    hint = "is it a state dict, saved by torch.save?"
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=limits.seconds, check=False)
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


def _publish(plain: Path, output: Path) -> None:
    """Give a finished file its name, after its bytes are on the disk."""
    _refuse_existing(output)
    try:
        plain.chmod(plain.parent.stat().st_mode & 0o666)  # safetensors writes files that only their owner may read
        sync(plain)
        os.replace(plain, output)
        sync(output.absolute().parent)
    except OSError as error:
        raise DiteError(f"can't write {output}", error.strerror or str(error), "choose another -o, or make room") from error


def _model(plain: Path, num_heads: int | None, memory_bytes: int) -> Any:
    """The model whose state dict this is."""
    from safetensors.torch import load_file

    tensors = load_file(plain)
    if not is_upstream_dit(tensors):
        why = f"its tensors are called {', '.join(sorted(tensors)[:3])} …; those of a DiT begin with blocks., x_embedder., y_embedder., final_layer."
        raise CheckpointError("this is no model that dite convert knows", why, "give -o FILE.safetensors for its plain state dict")
    return model_of(tensors, num_heads, memory_bytes)
