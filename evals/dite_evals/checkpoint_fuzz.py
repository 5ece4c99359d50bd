"""Spoil a saved quantized model or pipeline at random and load it, many times over: what may come of that?

    refused   a DiteError that says what and why
    same      it loads, and is the original, bit for bit
    other     it loads as another model, which is exactly what its files say: only possible where the manifest was made anew, or is gone

Anything else is a failure: another exception, a hang, a load under the original manifest that is not the original, a model that is not what its files
say. A crash ends the process, and is counted by who started it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dite
from dite.errors import DiteError
from dite_evals.checkpoint_lies import read_text
from dite_evals.checkpoint_mutants import FOLDER, LINK, PIPE, Content, mutate
from dite_evals.random_models import tiny_pipeline

MANIFEST = "dite_manifest.json"
WORK_S, WAIT_S = 10, 120  # of the processor, which a busy machine keeps from it for longer; and of the clock, for what waits for nothing
MEMORY_BYTES = 2**30  # beyond what the process had when it began
SEALED, RESEALED, UNSEALED = "sealed", "resealed", "unsealed"


@dataclass
class Outcomes:
    """What came of some cases: counts by (seal, kind, outcome), and every failure with the number of its case."""

    counts: Counter = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0

    def total(self, outcome: str | None = None) -> int:
        """How many cases ended so."""
        return sum(count for (_, _, found), count in self.counts.items() if outcome in (None, found))

    def to_dict(self) -> dict[str, Any]:
        rows = [{"seal": seal, "mutation": kind, "outcome": outcome, "cases": count} for (seal, kind, outcome), count in sorted(self.counts.items())]
        return {"rows": rows, "failures": self.failures, "slowest_s": self.slowest_s}


class Subject:
    """A saved model or pipeline in a folder of its own (best on tmpfs), spoiled and mended again."""

    def __init__(self, saved: Path, folder: Path):
        self.folder = folder
        shutil.copytree(saved, folder)
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.original = {name: (_state(part), _config(part)) for name, part in _parts(dite.load(folder)).items()}

    def run(self, cases: range, deep: float) -> Outcomes:
        """Run cases by number. A share `deep` of them is given a new manifest, or none, so that more than digests stands in their way."""
        found = Outcomes()
        with _limits():
            for number in cases:
                draw = random.Random(f"dite checkpoint {number}")
                seal = draw.choice([RESEALED, UNSEALED]) if draw.random() < deep else SEALED
                kind, changes = mutate(self.files, draw)
                while all(self.files.get(name) == content for name, content in changes.items()):  # nothing was changed after all
                    kind, changes = mutate(self.files, draw)
                began = time.monotonic()
                outcome, why = self._case(changes, seal)
                found.slowest_s = max(found.slowest_s, time.monotonic() - began)
                found.counts[seal, kind, outcome] += 1
                if outcome not in ("refused", "same", "other"):
                    found.failures.append({"case": number, "seal": seal, "mutation": kind, "outcome": outcome, "why": why})
        return found

    def _case(self, changes: dict[str, Content], seal: str) -> tuple[str, str]:
        changes = changes | self._manifest(changes, seal)
        try:
            self._put(changes)
            signal.setitimer(signal.ITIMER_PROF, WORK_S)
            signal.alarm(WAIT_S)
            try:
                model = dite.load(self.folder)
            finally:
                signal.alarm(0)
                signal.setitimer(signal.ITIMER_PROF, 0)
            return self._judged(model, seal)
        except DiteError as error:
            return ("refused", "") if error.what and error.why else ("silent refusal", repr(error))
        except _Hang:
            return "hang", f"more than {WORK_S} s of work, or {WAIT_S} s of waiting"
        except Exception as error:
            return "other exception", repr(error)[:500]
        finally:
            self._mend(changes)

    def _judged(self, model: Any, seal: str) -> tuple[str, str]:
        found = {name: (_state(part), _config(part)) for name, part in _parts(model).items()}
        changed = [name for name in found.keys() | self.original.keys() if not _same(found.get(name), self.original.get(name))]
        if not changed:
            return "same", ""
        if seal == SEALED:
            return "silently wrong", "it loads under the original manifest, and is another model"
        index = self.folder / "model_index.json"
        named = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        for name in changed:
            lost = name not in found and named.get(name) not in (None, [None, None])
            why = "it is not there" if lost else _disbelieved(self.folder / name, *found[name], anybodys=seal == UNSEALED) if name in found else ""
            if why:
                return "silently wrong", f"{name or 'the model'}: {why}"
        return "other", ""

    def _manifest(self, changes: dict[str, Content], seal: str) -> dict[str, Content]:
        if seal == UNSEALED:
            return {MANIFEST: None}
        if seal == SEALED or MANIFEST in changes:
            return {}
        now = {name: data for name, data in (self.files | changes).items() if isinstance(data, bytes) and name != MANIFEST}
        entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in now.items()}
        return {MANIFEST: json.dumps(json.loads(self.files[MANIFEST]) | {"files": entries}).encode()}

    def _put(self, changes: dict[str, Content]) -> None:
        for name, content in changes.items():
            path = self.folder / name
            _remove(path)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content == LINK:
                path.symlink_to(self.folder.parent / "outside")
            elif content == PIPE:
                os.mkfifo(path)
            elif content == FOLDER:
                path.mkdir()

    def _mend(self, changes: dict[str, Content]) -> None:
        for name in changes:
            _remove(self.folder / name)
            if name in self.files:
                (self.folder / name).write_bytes(self.files[name])


class _Hang(BaseException):
    """Passes through `except Exception`."""


@contextmanager
def _limits() -> Iterator[None]:
    """Alarms that end hangs, and a limit on memory, so that what allocates by what a file claims fails."""

    def ring(*_: Any) -> None:
        raise _Hang

    handlers = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def small_model(folder: Path) -> Path:
    """A quantized model as small as they come, with every sort of tensor: 2 blocks of width 16, smoothed, with low-rank parts."""
    pipe = tiny_pipeline()
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    few = ["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=8", "rounding=nearest", "rank=2"]
    dite.quantize(pipe, "w4a8", overrides=[*few, "transform=smooth+lowrank"])
    return dite.save(pipe.transformer, folder)


def _parts(model: Any) -> dict[str, Any]:
    """The parts of a pipeline by name, or a bare model under no name."""
    return {name: part for name, part in getattr(model, "components", {"": model}).items() if part is not None}


def _state(part: Any) -> dict[str, torch.Tensor]:
    state = part.state_dict() if isinstance(part, torch.nn.Module) else {}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _config(part: Any) -> dict[str, Any]:
    """What a part does besides its tensors: a tokenizer's words and rules; what a text encoder makes of a text, as its configuration keeps much that
    nothing reads, and which of its tensors are others; a configuration of diffusers."""
    kind = {"class": type(part).__name__}
    if hasattr(part, "backend_tokenizer"):
        return kind | {"tokenizer": json.loads(part.backend_tokenizer.to_str()), "length": part.model_max_length}
    stored = getattr(part, "config", {})
    quantization = getattr(stored, "quantization_config", None)
    layers = quantization if isinstance(quantization, dict) else quantization.to_dict() if quantization is not None else {}
    kind |= {"layers": layers.get("layers", {})}
    if hasattr(stored, "to_diff_dict"):
        try:
            made = hashlib.sha256(read_text(part).numpy().tobytes()).hexdigest()
        except (RuntimeError, IndexError) as error:  # fewer words than the text has
            made = type(error).__name__
        return kind | {"reads": made, "tied": _tied(part)}
    values = {key: value for key, value in stored.items() if not key.startswith("_") and key != "quantization_config"}
    return kind | json.loads(json.dumps(values, default=repr))


def _tied(part: torch.nn.Module) -> dict[str, str]:
    """Names of tensors that lie where another one does, with the other's."""
    first: dict[tuple[int, Any], str] = {}
    found = {}
    for name, tensor in part.state_dict(keep_vars=True).items():
        owner = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if owner != name:
            found |= {name: owner, owner: name}
    return found


def _disbelieved(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], anybodys: bool) -> str:
    """How a loaded part differs from what its files say; empty where it does not. Files of `anybodys` may hold more tensors than the model has, as
    many do, and keys that no model knows, unless we quantized it."""
    from safetensors.torch import load_file

    if "tokenizer" in config:
        return _other_words(folder, config["tokenizer"])
    theirs = "reads" in config  # of transformers, whose files lack tied tensors
    scheduler = folder / "scheduler_config.json"
    values = json.loads((scheduler if not state and scheduler.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    stored = values.pop("quantization_config", {})
    if state:
        files = load_file(folder / ("model.safetensors" if theirs else "diffusion_pytorch_model.safetensors"))
        files = {name: tensor.to(state[name].dtype) if name in state else tensor for name, tensor in files.items()}
        if anybodys and not stored:
            files = {name: tensor for name, tensor in files.items() if name in state}
        if theirs:
            files |= {name: files[owner] for name, owner in config["tied"].items() if name not in files and owner in files}
        if not _equal(state, files):
            return "its tensors are not its file's"
    said = {key: value for key, value in values.items() if not theirs and not key.startswith("_") and (key in config or stored or not anybodys)}
    wrong = [key for key, value in said.items() if config.get(key) != value]
    wrong += ["layers"] if stored.get("layers", {}) != config["layers"] else []
    return f"its configuration says otherwise of {wrong[0]}" if wrong else ""


def _other_words(folder: Path, tokenizer: dict[str, Any]) -> str:
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"), parse_int=float)["model"]["vocab"] if path.is_file() else None  # scores are fp64
    return "" if said == tokenizer["model"]["vocab"] else "its words are not its file's"


def _same(ours: tuple | None, theirs: tuple | None) -> bool:
    return ours is not None and theirs is not None and ours[1] == theirs[1] and _equal(ours[0], theirs[0])


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(_bits(ours[name]) == _bits(theirs[name]) for name in ours)


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A NaN equals itself here."""
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
