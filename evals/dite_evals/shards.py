"""What a long run has done so far, on disk, so that an interrupted run goes on where it was, and several ranks can share one.

    FOLDER/config.json                        what the images depend on; another configuration refuses the folder
    FOLDER/shard-000050.safetensors           images uint8 [B, 3, H, W] of samples 50..
    FOLDER/features-NAME/shard-000200.…       features fp32 [B, F] of samples 200.. under one extractor, and what else it gives

Every file is written under another name, then renamed: a shard is there whole or not at all. Samples are pure functions of their index, so that a
longer run keeps the shards of a shorter one, and shards that overlap agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dite.errors import CheckpointError, ResumeConflict
from dite.outputs import write_file

CONFIG = "config.json"
Span = tuple[int, int]


def digest(configuration: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def claim(folder: Path, configuration: dict[str, Any], discard: bool = False) -> bool:
    """Whether `folder` holds shards of another configuration, which `discard` lets `begin` delete.

    Changes nothing, so that every rank can ask before one begins. Raises ResumeConflict for another configuration without `discard`, and for a
    folder that is not ours.
    """
    found = _found(folder)
    if found is None or found == configuration:
        return False
    if not discard:
        raise ResumeConflict(
            f"{folder} belongs to a run with other settings", _differences(found, configuration), "use --discard to begin anew, or another -o"
        )
    return True


def begin(folder: Path, configuration: dict[str, Any], stale: bool) -> None:
    """Make `folder` ready for shards of `configuration`, without those that are `stale` and what killed processes left."""
    for path in folder.glob("**/*.partial") if folder.is_dir() else ():
        path.unlink(missing_ok=True)
    for path in folder.glob("**/shard-*.safetensors") if stale else ():
        path.unlink(missing_ok=True)
    write_file(folder / CONFIG, (json.dumps(configuration, indent=2, sort_keys=True) + "\n").encode())


class Shards:
    """Rows of named tensors in the shards of one folder, all written under the same `facts`. One thread of a process uses it."""

    def __init__(self, folder: Path, facts: Mapping[str, str], writes: bool = True):
        """Without `writes` (another rank writes the same) only those are seen that are there now, and `write` changes nothing."""
        self.folder = folder
        self.facts = dict(facts)
        self.writes = writes
        self._spans = self._look()
        self._last: tuple[Path, dict[str, torch.Tensor]] | None = None

    def covers(self, start: int, stop: int) -> bool:
        """Whether rows start..stop−1 are all here."""
        return not self.missing(start, stop)

    def missing(self, start: int, stop: int) -> list[Span]:
        """The gaps among rows start..stop−1."""
        gaps, at = [], start
        for first, last in sorted(self._spans.values()):
            if last <= at or first >= stop:
                continue
            if first > at:
                gaps.append((at, first))
            at = max(at, last)
        return gaps + ([(at, stop)] if at < stop else [])

    def write(self, start: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store the rows from `start` on. Raises DiteError when the disk is full or can't be written."""
        if not self.writes:
            return
        path = self.folder / f"shard-{start:06}.safetensors"
        rows = {name: value.contiguous() for name, value in tensors.items()}
        count = len(next(iter(rows.values())))
        write_file(path, save(rows, self.facts | {"start": str(start), "count": str(count)}))
        self._spans[path] = (start, start + count)
        self._last = None

    def read(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows start..stop−1 of each tensor, which must be covered. Raises CheckpointError for a damaged shard."""
        parts: list[dict[str, torch.Tensor]] = []
        at = start
        for path, (first, last) in sorted(self._spans.items(), key=lambda item: item[1]):
            if first <= at < last and at < stop:
                rows = self._rows(path, first, last)
                parts.append({name: value[at - first : stop - first] for name, value in rows.items()})
                at = min(last, stop)
        assert at == stop, f"rows {at} to {stop - 1} are not in {self.folder}"
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def drop(self, start: int, stop: int) -> None:
        """Delete the shards that lie within rows start..stop−1."""
        for path, (first, last) in list(self._spans.items()):
            if start <= first and last <= stop:
                del self._spans[path]
                if self.writes:
                    path.unlink(missing_ok=True)

    def refresh(self) -> None:
        """See what others have written."""
        self._spans = self._look()
        self._last = None

    def _look(self) -> dict[Path, Span]:
        return dict(_span(path, self.facts) for path in sorted(self.folder.glob("shard-*.safetensors")))

    def _rows(self, path: Path, first: int, last: int) -> dict[str, torch.Tensor]:
        if self._last is None or self._last[0] != path:
            self._last = path, _tensors(path, self.facts | {"start": str(first), "count": str(last - first)})
        return self._last[1]


def _span(path: Path, facts: Mapping[str, str]) -> tuple[Path, Span]:
    metadata = _open(path, lambda file: file.metadata() or {})
    numbers = [metadata.get(key, "") for key in ("start", "count")]
    if not all(number.isascii() and number.isdigit() and len(number) < 16 for number in numbers) or path.stem != f"shard-{int(numbers[0]):06}":
        raise CheckpointError(f"{path} is no shard", f"it says {metadata}", "delete it; it will be made again")
    if not metadata.items() >= facts.items():
        raise CheckpointError(f"{path} is of another run", f"it says {metadata}, this run {dict(facts)}", "delete it, or choose another -o")
    return path, (int(numbers[0]), int(numbers[0]) + int(numbers[1]))


def _tensors(path: Path, facts: dict[str, str]) -> dict[str, torch.Tensor]:
    metadata, rows = _open(path, lambda file: (file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}))  # noqa: SIM118
    if metadata != facts or {str(len(value)) for value in rows.values()} != {facts["count"]}:
        held = {key: list(value.shape) for key, value in rows.items()}
        raise CheckpointError(f"{path} is no shard of this run", f"it says {metadata} and holds {held}", "delete it; it will be made again")
    return rows


def _open(path: Path, look: Any) -> Any:
    try:
        with safe_open(path, "pt") as file:
            return look(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read {path}", str(error), "delete this shard; it will be made again") from error


def _found(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError:
        if folder.exists() and any(path for path in folder.iterdir() if path.suffix != ".partial"):
            raise ResumeConflict(f"{folder} is not empty", f"it has no {CONFIG}, so it is not ours", "choose another -o") from None
        return None
    except (ValueError, TypeError) as error:
        raise ResumeConflict(f"{folder / CONFIG} is damaged", str(error), "delete the folder") from error


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return "; ".join(f"{key} was {_short(found.get(key))}, now {_short(wanted.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
