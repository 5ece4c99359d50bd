"""Images of a long run on disk, in shards, so that an interrupted run goes on where it was.

    FOLDER/config.json                       what the images depend on; another configuration refuses the folder
    FOLDER/shard-000050.safetensors          images uint8 [B, 3, H, W] of samples 50.., written under another name, then renamed

Samples are pure functions of their index, so a longer run keeps the shards of a shorter one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dite.errors import CheckpointError, ResumeConflict

CONFIG = "config.json"


def digest(configuration: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


class ShardStore:
    """Shards of one configuration in one folder."""

    def __init__(self, folder: Path, configuration: dict[str, Any], force: bool = False, writes: bool = True):
        """Open or create. Raises ResumeConflict when the folder holds another configuration; `force` deletes its shards instead. Without `writes`
        (another rank does that) nothing is changed."""
        self.folder = folder
        self.digest = digest(configuration)
        self.writes = writes
        self._stale = False
        found = self._found()
        if found is not None and found != configuration:
            if not force:
                raise ResumeConflict(
                    f"{folder} belongs to a run with other settings", _differences(found, configuration), "use --force to begin anew, or another -o"
                )
            self._stale = not writes
            for path in self._paths():
                path.unlink()
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / CONFIG, json.dumps(configuration, indent=2, sort_keys=True) + "\n")

    def write(self, start: int, images: torch.Tensor) -> None:
        """Store the samples from `start` on."""
        if not self.writes:
            return
        path = self.folder / f"shard-{start:06}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({"images": images.contiguous()}, partial, {"config": self.digest, "start": str(start)})
        os.replace(partial, path)

    def read(self, limit: int) -> torch.Tensor | None:
        """The images of samples 0, 1, .. without a gap, at most `limit`; None when there are none."""
        batches: list[torch.Tensor] = []
        done = 0
        for path in self._paths():
            start = int(path.stem.removeprefix("shard-"))
            if done >= limit or start > done:
                break
            # Shards overlap where a longer run drew a ragged last micro-batch again; both hold the same images there.
            batches.append(self._read_shard(path, start)[done - start :])
            done += len(batches[-1])
        return torch.cat(batches)[:limit] if batches else None

    def _read_shard(self, path: Path, start: int) -> torch.Tensor:
        try:
            with safe_open(path, "pt") as file:
                metadata, images = file.metadata() or {}, file.get_tensor("images")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"can't read {path}", str(error), "delete this shard; it will be sampled again") from error
        if metadata != {"config": self.digest, "start": str(start)} or images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            raise CheckpointError(
                f"{path} is no shard of this run", f"it says {metadata}, {images.dtype} {list(images.shape)}", "delete it; it will be sampled again"
            )
        return images

    def _paths(self) -> list[Path]:
        return [] if self._stale else sorted(self.folder.glob("shard-*.safetensors"))

    def _found(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / CONFIG).read_text(encoding="utf-8")))
        except FileNotFoundError:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ResumeConflict(f"{self.folder} is not empty", f"it has no {CONFIG}, so it is not ours", "choose another -o") from None
            return None
        except (ValueError, TypeError) as error:
            raise ResumeConflict(f"{self.folder / CONFIG} is damaged", str(error), "delete the folder") from error


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return "; ".join(f"{key} was {_short(found.get(key))}, now {_short(wanted.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
