"""What an interrupted quantization leaves behind, so that `--resume` repeats nothing that took long.

<output>.journal/
  header.json           what the run is: digests of model and recipe; another run's journal is refused
  calls.safetensors     the recorded calibration calls, with their structure in the metadata
  fitness.jsonl         of a search: one synced line a fitness evaluation: {"key": digest of a choice, "error": number}
  layers/*.safetensors  without a search: each layer as it was quantized

Everything else (the options that a search has for each layer) is computed again; it depends on these and on nothing random, so that what comes
out is the same.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dite.errors import ResumeConflict
from dite.ptq.calibrate import Calls

HEADER, CALLS, FITNESS, LAYERS = "header.json", "calls.safetensors", "fitness.jsonl", "layers"
FACTS = "facts"


def holds_work(folder: Path) -> bool:
    """Whether a run left anything in `folder` that it would take time to repeat."""
    fitness = folder / FITNESS
    return (folder / CALLS).exists() or (folder / LAYERS).exists() or (fitness.exists() and fitness.stat().st_size > 0)


class Journal:
    """An open journal in `folder`, created unless it is there. Raises ResumeConflict when it is another run's."""

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = open(folder / FITNESS, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the search
        self._lock()
        path = folder / HEADER
        if path.exists() and holds_work(folder):
            self._check(path, header)
        else:
            _write_synced(path, json.dumps(header, indent=1))
        self.known: dict[str, float] = dict(self._records())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_exception: Any) -> None:
        self._stream.close()

    def add(self, key: str, error: float) -> None:
        """Write an evaluation down; it is on disk when this returns."""
        self.known[key] = error
        self._stream.write(json.dumps({"key": key, "error": error}) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def calls(self) -> dict[str, Calls] | None:
        """The calls that an earlier run recorded, if it came to that."""
        try:
            return read_calls(self.folder / CALLS)
        except (FileNotFoundError, SafetensorError, ValueError, KeyError):
            return None

    def keep_calls(self, calls: dict[str, Calls]) -> None:
        """Write calls down, whole or not at all."""
        write_calls(calls, self.folder / CALLS)

    def keep_layer(self, name: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Write a quantized layer down, whole or not at all; `facts` go through JSON."""
        path = self._layer(name)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, {FACTS: json.dumps(facts)})
        _sync(partial)
        os.replace(partial, path)

    def layer(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What `keep_layer` wrote for `name`, if an earlier run came to that."""
        try:
            with safe_open(self._layer(name), "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[FACTS])  # noqa: SIM118 - no mapping
        except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _layer(self, name: str) -> Path:
        return self.folder / LAYERS / f"{name}.safetensors"

    def _check(self, path: Path, header: dict[str, Any]) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        wrong = next((key for key, value in header.items() if found.get(key) != value), None)
        if wrong is not None:
            raise ResumeConflict(
                f"{self.folder} is the journal of another run",
                f"its {wrong} is {found.get(wrong)!r}, this run's is {header[wrong]!r}",
                "repeat the interrupted command exactly, or delete that folder to start anew",
            )

    def _lock(self) -> None:
        """One run at a time; the lock goes with its process, however that ends. Where files can't be locked, nothing is."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise ResumeConflict(f"{self.folder} is in use", "another process is working with it", "wait for it, or choose another -o") from error

    def _records(self):
        path = self.folder / FITNESS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the last line was cut off by a kill
            self._stream.truncate(len(whole.encode()))
        for line in whole.splitlines():
            record = json.loads(line)
            yield record["key"], record["error"]


def write_calls(calls: dict[str, Calls], path: Path) -> None:
    """Calls as one safetensors file; what is not a tensor goes into its metadata as JSON."""
    tensors: dict[str, torch.Tensor] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.contiguous()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": {key: skeleton(item) for key, item in value.items()}}
        if type(value) in (list, tuple):
            return {type(value).__name__: [skeleton(item) for item in value]}
        if isinstance(value, list | tuple):
            raise TypeError(f"{type(value)} would not come back as it was")
        return {"value": value}

    partial = path.with_suffix(".partial")
    try:
        structure = {name: {part: skeleton(getattr(some, part)) for part in ("calibration", "held_out")} for name, some in calls.items()}
        text = json.dumps(structure)
    except TypeError:
        return  # a call holds something that JSON can't: it will be recorded again
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, partial, {"structure": text})
    _sync(partial)
    os.replace(partial, path)


def read_calls(path: Path) -> dict[str, Calls]:
    """What `write_calls` wrote."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        structure = json.loads(file.metadata()["structure"])

        def filled(node: dict[str, Any]) -> Any:
            ((kind, value),) = node.items()
            if kind == "tensor":
                return file.get_tensor(str(value))
            if kind == "dict":
                return {key: filled(item) for key, item in value.items()}
            if kind in ("list", "tuple"):
                return [filled(item) for item in value] if kind == "list" else tuple(filled(item) for item in value)
            return value

        return {name: Calls(filled(parts["calibration"]), filled(parts["held_out"])) for name, parts in structure.items()}


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _write_synced(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
