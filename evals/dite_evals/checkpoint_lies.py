"""Every field of every configuration of a saved pipeline, set to each of the values that loaders trip over.

The manifest is made anew after each lie, so that no digest gives it away: what is asked is whether the loader believes it. Outcomes: `refused`;
`same` (what is loaded computes with the original's numbers, bit for bit, so that the field only informs); `other` (it loads as something else),
which must not be. Names of classes inform too: a name that is missing is refused when it is asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dite
from dite.errors import DiteError

MANIFEST = "dite_manifest.json"
SCHEMES = ("quantization_config", "layers")
ADDED, TWICE = "\0added", "\0twice"
HARMLESS = {("vae/config.json", "shift_factor"): 0}  # where null says the same: no shift
NO_LIMIT = 10**6  # transformers writes 10**30 for a tokenizer whose texts may be of any length
Path_ = tuple[Any, ...]


def lies_about(value: Any) -> dict[str, Any]:
    """What is claimed instead of `value`, by name."""
    wrong_type = [] if isinstance(value, str) or value is None else "x"
    return {"0": 0, "-1": -1, "2^31": 2**31, "2^63": 2**63, "wrong type": wrong_type, "missing": ..., "extra": ADDED, "duplicated": TWICE}


def fields(values: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every field, mappings and lists included; of the quantized layers, which are alike, the first one's."""
    for index, key in enumerate(values if isinstance(values, dict) else range(len(values))):
        if path == SCHEMES and index:
            return
        yield (*path, key)
        if isinstance(values[key], dict | list):
            yield from fields(values[key], (*path, key))


def told(values: dict[str, Any], path: Path_, lie: Any) -> bytes:
    """The JSON of `values` with the field at `path` set to `lie`."""
    values = copy.deepcopy(values)
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    if lie is ...:
        del holder[key]
    elif lie == TWICE:
        if isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[TWICE] = holder[key]
            return json.dumps(values).replace(json.dumps(TWICE), json.dumps(key)).encode()
    elif lie == ADDED:
        if isinstance(holder, list):
            holder.append("x")
        else:
            holder[f"{key}_x"] = copy.deepcopy(holder[key])
    else:
        holder[key] = lie
    return json.dumps(values).encode()


class Liar:
    """A copy of a saved pipeline that is lied about, one field at a time."""

    def __init__(self, saved: Path, folder: Path):
        self.folder = folder
        shutil.copytree(saved, folder)
        self.truth = facts(dite.load(folder))
        self.manifest = (folder / MANIFEST).read_bytes()

    def cases(self, names: list[str]) -> Iterator[tuple[str, Path_, str, Any]]:
        """(file, field, name of the lie, lie) for every field of the files called so."""
        for name in names:
            values = json.loads((self.folder / name).read_text(encoding="utf-8"))
            for path in fields(values):
                value = values
                for key in path:
                    value = value[key]
                yield from ((name, path, what, lie) for what, lie in lies_about(value).items() if type(lie) is not type(value) or lie != value)

    def tell(self, name: str, path: Path_, lie: Any) -> tuple[str, str]:
        """Lie, load, mend. Returns the outcome and, where it was refused, what was said."""
        before = (self.folder / name).read_bytes()
        try:
            (self.folder / name).write_bytes(told(json.loads(before), path, lie))
            if name != MANIFEST:
                self._reseal(name)
            found = facts(dite.load(self.folder))
            place = (name, ".".join(map(str, path)))
            harmless = place in HARMLESS and lie == HARMLESS[place]
            return ("same" if harmless or same(found, self.truth) else "other"), ""
        except DiteError as error:
            return "refused", f"{error.what}: {error.why}"
        except Exception as error:
            return "other exception", repr(error)
        finally:
            (self.folder / name).write_bytes(before)
            (self.folder / MANIFEST).write_bytes(self.manifest)

    def _reseal(self, name: str) -> None:
        values, data = json.loads(self.manifest), (self.folder / name).read_bytes()
        values["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (self.folder / MANIFEST).write_text(json.dumps(values), encoding="utf-8")


def facts(model: Any) -> dict[str, tuple[dict[str, torch.Tensor], Any]]:
    """Everything a pipeline computes with: each part's tensors, tables included, and its configuration."""
    return {name: _facts(part) for name, part in getattr(model, "components", {"": model}).items()}


def _facts(part: Any) -> tuple[dict[str, torch.Tensor], Any]:
    tensors = dict(part.state_dict()) | dict(part.named_buffers()) if isinstance(part, torch.nn.Module) else {}
    config = {"class": type(part).__name__}
    if hasattr(part, "backend_tokenizer"):
        config |= {"tokenizer": part.backend_tokenizer.to_str(), "length": min(part.model_max_length, NO_LIMIT), "special": part.special_tokens_map}
    elif hasattr(getattr(part, "config", None), "to_diff_dict"):  # a text encoder's configuration keeps what nothing reads, so it is asked to read
        tensors["\0output"] = read_text(part)
    else:
        config |= {key: value for key, value in getattr(part, "config", {}).items() if not key.startswith("_")}
        stored = config.pop("quantization_config", None)
        config["layers"] = stored.to_dict()["layers"] if stored is not None else None
    return tensors, config


@torch.no_grad()
def read_text(encoder: Any) -> torch.Tensor:
    """All numbers that a text encoder makes of a text with an end and padding, in one row."""
    output = encoder(torch.tensor([[0, 5, 7, 9, 1, 1, 1]]), output_hidden_states=True)
    found = [one for value in output.values() for one in (value if isinstance(value, tuple) else [value])]
    return torch.cat([one.flatten().float() for one in found])


def same(ours: dict, theirs: dict) -> bool:
    """Whether two models have the same parts, bit for bit."""
    if ours.keys() != theirs.keys():
        return False
    for name, (tensors, config) in ours.items():
        others, other_config = theirs[name]
        if config != other_config or tensors.keys() != others.keys() or not all(torch.equal(tensors[key], others[key]) for key in tensors):
            return False
    return True
