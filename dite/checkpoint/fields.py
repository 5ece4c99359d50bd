"""Each key of a configuration against the constructor that will be given it.

diffusers ignores keys that a constructor doesn't take, fills in defaults for those that are missing, and passes on any value: a letter changed in
a key's name makes another model, silently. What `dite.save` wrote was complete, so that it can be held to it.
"""

import inspect
import re
import types
import typing
from typing import Any

from dite.errors import CheckpointError

PRIVATE = {"_class_name", "_diffusers_version", "_use_default_values", "_name_or_path", "_commit_hash"}
ADDED = {"quantization_config", "dtype", "torch_dtype"}  # what diffusers adds to a constructor's arguments
VERSION = re.compile(r"\d+\.\d+[\w.+-]{0,40}")
EPSILON = re.compile(r"(^|_)eps(ilon)?$")
AT_LEAST_ONE = ("size", "channels", "dim", "heads", "groups")
DAMAGED = "copy or download the folder again"
KINDS = {type(None): "null", bool: "flag", int: "number", float: "number", str: "text", list: "list", tuple: "list", dict: "mapping"}


def check_fields(cls: type, values: dict[str, Any], file: str) -> None:
    """Raise CheckpointError that names file and key unless `values` are what a `cls` of this or another diffusers version stored."""
    import diffusers

    arguments = {name: argument for name, argument in _signature(cls).parameters.items() if name != "self"}
    positive = issubclass(cls, diffusers.SchedulerMixin)
    open_ended = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    unknown = next((key for key in values if key not in PRIVATE | ADDED and key not in arguments), None)
    if unknown is not None and not (open_ended and not unknown.startswith("_")):
        raise CheckpointError(
            f"{file} has a key {unknown[:80]!r}", f"{cls.__name__} of diffusers {diffusers.__version__} takes no such argument", DAMAGED
        )
    version = check_version(values, file)
    if version == diffusers.__version__:
        ignored = {*getattr(cls, "ignore_for_config", ()), *getattr(cls, "_deprecated_kwargs", ())}
        positional = (name for name, argument in arguments.items() if argument.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        missing = next((name for name in positional if name not in values and name not in ignored), None)
        if missing is not None:
            raise CheckpointError(f"{file} lacks {missing}", f"{cls.__name__} of diffusers {version} stores it", DAMAGED)
    for key, value in values.items():
        if key in arguments:
            _check(file, key, value, arguments[key], positive)


def check_version(values: dict[str, Any], file: str) -> str:
    """The diffusers version that wrote `file`."""
    version = values.get("_diffusers_version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise CheckpointError(f"{file}: _diffusers_version is {version!r}", "it is the version that wrote the file", DAMAGED)
    return version


def _signature(cls: type) -> inspect.Signature:
    try:
        return inspect.signature(cls.__init__, eval_str=True)
    except Exception:  # an annotation may name what is imported for type checkers only
        return inspect.signature(cls.__init__)


def _check(file: str, key: str, value: Any, argument: inspect.Parameter, positive: bool) -> None:
    default = None if argument.default is inspect.Parameter.empty else argument.default
    allowed = _kinds(argument.annotation) | {KINDS.get(type(default), "any")}
    kind = KINDS[type(value)]
    if "any" not in allowed and kind not in allowed and not (kind == "list" and "number" in allowed):
        raise CheckpointError(f"{file}: {key} is a {kind}", f"it must be a {' or a '.join(sorted(allowed))}", DAMAGED)
    if kind == "list" and not value and default not in ((), []):
        raise CheckpointError(f"{file}: {key} is an empty list", "it holds something, or is null", DAMAGED)
    if kind != "number":
        return
    lowest = 1 if key.endswith(AT_LEAST_ONE) else 0
    if isinstance(value, int) and value < lowest and not (isinstance(default, int) and value >= default):
        raise CheckpointError(f"{file}: {key} is {value}", f"it is a whole number from {lowest}", DAMAGED)
    if (EPSILON.search(key) and not 0 < value <= 1) or ("dropout" in key and not 0 <= value <= 1):
        raise CheckpointError(f"{file}: {key} is {value}", "it is a number from 0 to 1", DAMAGED)
    if (positive or key.endswith("scaling_factor")) and isinstance(default, int | float) and default > 0 >= value:
        raise CheckpointError(f"{file}: {key} is {value}", "it is a number above 0", DAMAGED)


def _kinds(annotation: Any) -> set[str]:
    """What may stand in JSON for an annotation; `any` where that can't be told."""
    if getattr(annotation, "__name__", "") == "ndarray":
        return {"list"}
    if annotation in (int, float):
        return {"number"}
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for one in typing.get_args(annotation) for kind in _kinds(one)}
    if origin is typing.Literal:
        return {KINDS.get(type(one), "any") for one in typing.get_args(annotation)}
    return {KINDS.get(origin or annotation, "any")}
