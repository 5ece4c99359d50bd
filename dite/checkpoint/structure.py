"""Does config.json describe the tensors that lie beside it? Asked before anything is allocated.

A configuration decides how many layers a loader builds, and how large; nothing stops it from claiming 2^31 of them. So the model is first built on
the meta device, where tensors have shapes and no memory, under a limit on how many modules the file's tensors can be worth; then names, shapes and
kinds of numbers are compared with the headers. Tables that a model makes for itself (positions) are in no file: they may take as much as weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dite.checkpoint.diffusers_quantizer import DiteConfig, insert_planned_
from dite.checkpoint.encoders import check_encoder
from dite.checkpoint.fields import check_fields
from dite.checkpoint.header import stored_tensors
from dite.checkpoint.index import check_pipeline, check_values, kind_of
from dite.checkpoint.skeleton import REFUSED, check_tables, described
from dite.checkpoint.tokenizers import check_tokenizer
from dite.errors import CheckpointError

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
SCALES = {"F32", "F16"}
CODES = {"U8"}
INTEGERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}


def check_structure(folder: Path, sealed: bool) -> int:
    """Check every part of a model or pipeline folder; returns how many tensors its files hold.

    `sealed`: it was written by `dite.save`, so that names must agree everywhere, and not in quantized models only (old diffusers models have other
    names on disk than in memory). Raises CheckpointError that names the file and the key or tensor.
    """
    if not (folder / "model_index.json").is_file():
        return _check_model(folder, "config.json", sealed, None)
    total = 0
    for name, (library, class_name) in check_pipeline(folder, sealed).items():
        kind, place = kind_of(library, class_name), folder / name
        if kind is None:
            check_tokenizer(place, name, class_name)
            continue
        config = place / ("scheduler_config.json" if kind == "scheduler" else "config.json")
        if not config.is_file():
            raise CheckpointError(f"{name}/{config.name} is missing", f"model_index.json names the part {name}", "download the folder again")
        label = f"{name}/{config.name}"
        if kind == "diffusers" and _class(class_name, "ModelMixin"):
            total += _check_model(place, label, sealed, class_name)
            continue
        if kind == "transformers":
            total += check_encoder(place, label, class_name, sealed)
            continue
        values = check_values(config, kind, label)
        if kind == "scheduler" and sealed:
            _check_class(values, label, class_name)
            if scheduler := _class(class_name, "SchedulerMixin"):
                check_fields(scheduler, values, label)
        total += len(stored_tensors(place)) if kind != "scheduler" else 0
    return total


def _check_model(folder: Path, file: str, sealed: bool, class_name: str | None) -> int:
    values = check_values(folder / "config.json", "diffusers", file)
    if sealed and class_name is not None:
        _check_class(values, file, class_name)
    stored = stored_tensors(folder)
    skeleton = _skeleton(values, file, len(stored))
    if skeleton is None:
        return len(stored)
    expected, ours = skeleton
    if sealed or ours:
        check_fields(type(expected), values, file)
    state = expected.state_dict()
    check_tables(expected, stored, file)
    if sealed or ours:
        _compare(state, stored, folder, file, getattr(expected, "_keys_to_ignore_on_load_unexpected", None) or ())
    return len(stored)


def _skeleton(values: dict[str, Any], file: str, tensors: int) -> tuple[nn.Module, bool] | None:
    """The model that a configuration describes, without contents, and whether we quantized it; None where another library did."""
    name = values.get("_class_name")
    cls = _class(name, "ModelMixin")
    if cls is None:
        why = "dite loads models of the installed diffusers"
        raise CheckpointError(f"{file} names the class {name or '(none)'}", f"it holds no diffusers model; {why}", "upgrade diffusers?")
    stored = values.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise CheckpointError("quantization_config can't be read", f"in {file}, it is no mapping", "is config.json damaged?")
    if stored is not None and stored.get("quant_method") != "dite":
        if "format_version" in stored or not isinstance(stored.get("quant_method"), str):
            raise CheckpointError("quantization_config can't be read", f"in {file}, quant_method is not dite", "is config.json damaged?")
        return None
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    with described(file, name, tensors):
        skeleton = cls.from_config(plain)
        if stored is not None:
            insert_planned_(skeleton, DiteConfig.from_dict(stored))
    return skeleton, stored is not None


def _class(name: Any, base: str) -> type | None:
    """The class of diffusers that `name` names, if it is a `base`."""
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, getattr(diffusers, base)) else None


def _check_class(values: dict[str, Any], file: str, class_name: str) -> None:
    if values.get("_class_name") != class_name:
        why = f"model_index.json says {class_name}"
        raise CheckpointError(f"{file}: _class_name is {values.get('_class_name')!r}", why, "copy or download the folder again")


def _compare(expected: dict[str, torch.Tensor], stored: dict[str, dict[str, Any]], folder: Path, file: str, ignored: Any) -> None:
    where = folder.name + "/" if file != "config.json" else ""
    for name, tensor in expected.items():
        entry = stored.get(name)
        if entry is None:
            raise CheckpointError(f"{name} is missing", f"the files of {where}*.safetensors lack the tensor {name}, which {file} describes", REFUSED)
        if tuple(entry["shape"]) != tuple(tensor.shape):
            why = f"it is {tuple(entry['shape'])} in {where}*.safetensors; {file} needs {tuple(tensor.shape)}"
            raise CheckpointError(f"{name} has the wrong shape", why, REFUSED)
        kinds = _kinds(name, tensor, expected)
        if entry["dtype"] not in kinds:
            rule = "codes are torch.uint8" if kinds is CODES else f"{file} needs {' or '.join(sorted(kinds))}"
            raise CheckpointError(f"{name} has the wrong dtype", f"it is {entry['dtype']} in {where}*.safetensors; {rule}", REFUSED)
    extra = next((name for name in stored if name not in expected and not any(word in name for word in ignored)), None)
    if extra is not None:
        raise CheckpointError(f"{extra} should not be there", f"{where}*.safetensors holds it, {file} describes no such tensor", REFUSED)


def _kinds(name: str, tensor: torch.Tensor, expected: dict[str, torch.Tensor]) -> set[str]:
    """The safetensors dtypes that a loader may find for `tensor`."""
    if name.endswith(".scale") and name.removesuffix("scale") + "qdata" in expected:
        return SCALES
    if tensor.is_floating_point():
        return FLOATS
    return CODES if tensor.dtype == torch.uint8 else INTEGERS
