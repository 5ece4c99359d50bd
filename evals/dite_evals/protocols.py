"""Protocols: everything that a quoted number depends on, as data (`recipes/eval/*.yaml`).

A protocol fixes N, steps, guidance, seed, precision and micro-batch. Whatever a run changes is listed beside its result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dite.errors import RecipeError, UsageError, did_you_mean
from dite.recipe import override_key, read_yaml, read_yaml_file, recipe_folder, recipe_names, validate

MANY_CLASSES = 64


class _Protocol(BaseModel):
    """What both kinds have in common. `dtype: null` takes the models as they are stored. `threads` of each process on a CPU, where they may decide
    the last bits: with a number there, a run of any number of ranks gives the same ones; null takes as many as there are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    n: int = Field(ge=1, le=2**31)
    steps: int = Field(ge=1, le=1000)
    guidance: float = Field(ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**32)
    micro_batch: int = Field(default=8, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    threads: int | None = Field(default=None, ge=1, le=1024)
    prompts: list[str] = Field(default_factory=list)


class FidelityProtocol(_Protocol):
    """Paired comparison with a baseline."""

    kind: Literal["fidelity"]


class FidProtocol(_Protocol):
    """Distance to a data set. `extractor`: `inception`, `dinov2` or `clip` with its `weights` and `resize`, or a folder or `builtin:NAME` with a
    classifier. `statistics`: a file, or such a folder; null in a protocol that waits for the user's. `allow_few`: also where N is not larger than the
    number of features, so that the number means nothing."""

    kind: Literal["fid"]
    extractor: str
    statistics: str | None
    weights: str | None = None
    resize: Literal["clean", "legacy", "none"] | None = None
    allow_few: bool = False


Protocol = FidelityProtocol | FidProtocol
_KINDS: dict[str, type[FidelityProtocol] | type[FidProtocol]] = {"fidelity": FidelityProtocol, "fid": FidProtocol}


def load_protocol(
    source: str | Path | dict[str, Any] | Protocol, kind: str | None = None, overrides: Sequence[str] = (), **changes: Any
) -> tuple[Protocol, dict[str, Any]]:
    """A protocol by name, file or contents, with `overrides` (`key=value`) and then `changes` (None: keep) applied; and what they changed.

    Raises RecipeError for an unknown name, key or value, and for a protocol that isn't of `kind`.
    """
    values = _values(source)
    model = _KINDS.get(str(values.get("kind", "")))
    if model is None:
        raise RecipeError(
            f"protocol {values.get('name', source)} has no kind", f"kind is {values.get('kind')!r}, it must be fidelity or fid", "add kind: fidelity"
        )
    if kind is not None and values["kind"] != kind:
        fitting = [name for name in recipe_names("eval") if _values(name).get("kind") == kind]
        raise RecipeError(
            f"{values.get('name')} is no {kind} protocol",
            f"its kind is {values['kind']}",
            f"use {' or '.join(fitting)}, or dite eval {values['kind']}",
        )
    protocol = validate(model, values)
    wanted = values
    for override in overrides:
        wanted = override_key(wanted, override)
    wanted = wanted | {key: value for key, value in changes.items() if value is not None}
    settings = validate(model, wanted)
    return settings, {key: getattr(settings, key) for key in wanted if getattr(settings, key) != getattr(protocol, key)}


def balanced(classes: Sequence[Any], n: int) -> list[Any]:
    """The conditions of samples 0..n−1: `classes` in turn, so that sample i never depends on n.

    With many classes neighbours are alike (ImageNet begins with 151 animals), so the turn then strides by about 0.618 of their number.

    >>> balanced([0, 1, 2], 7)
    [0, 1, 2, 0, 1, 2, 0]
    >>> balanced(range(1000), 4)
    [0, 619, 238, 857]
    """
    count = len(classes)
    if count == 0:
        raise UsageError("there is nothing to draw", "the protocol has no prompts and the model no classes", "add prompts to the protocol")
    stride = 1
    if count > MANY_CLASSES:
        stride = next(s for s in range(int(count * 0.6180), count + 1) if math.gcd(s, count) == 1)
    return [classes[index * stride % count] for index in range(n)]


def _values(source: str | Path | dict[str, Any] | Protocol) -> dict[str, Any]:
    if isinstance(source, BaseModel):
        return source.model_dump()
    if isinstance(source, dict):
        return source
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"no protocol file {path}", "the file does not exist", "check it, or use a name from `dite recipes ls --kind eval`")
        return read_yaml_file(path)
    names = recipe_names("eval")
    if str(source) not in names:
        raise RecipeError(
            f"no protocol named {source}", f"known: {', '.join(names)}", did_you_mean(str(source), names) or "give a name or a .yaml file"
        )
    return read_yaml((recipe_folder("eval") / f"{source}.yaml").read_text(encoding="utf-8"), str(source))
