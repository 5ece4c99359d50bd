"""Save atomically: a temporary folder beside the output, everything synced, the manifest last, then one rename."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from torch import nn

from dite import __version__
from dite.checkpoint.diffusers_quantizer import recipe_of, search_plan_of
from dite.checkpoint.encoders import check_end
from dite.checkpoint.format import FORMAT_VERSION, MANIFEST, FileEntry, Manifest, file_digest, read_manifest
from dite.checkpoint.space import needed_bytes, room
from dite.checkpoint.swap import recover, replace_folder, sync
from dite.errors import OutputExists, UnsupportedModel, UsageError
from dite.models.access import denoisers, unwrap
from dite.outputs import OutputLock, check_writable
from dite.quant.linear import QuantLinear
from dite.quant.lora import UNLOAD, refuse_adapters
from dite.recipe import QuantRecipe

RECIPE, PLAN = "recipe.yaml", "plan.json"
MODEL_SUFFIXES = {".safetensors", ".json", ".yaml", ".txt", ".model", ".md", ".png", ".html", ".gitattributes"}


def save(
    model: Any, folder: str | Path, *, overwrite: bool = False, attachments: dict[str, str] | None = None, lock: OutputLock | None = None
) -> Path:
    """Write a pipeline or a bare model as a plain diffusers folder with a manifest; returns the folder.

    The folder appears whole or not at all, also when the process dies. `id2label`, which diffusers' own saving drops, is kept, and paths of this
    machine are not; a quantized model's recipe lies beside the weights, and the plan of one that was searched. `attachments` are further text files,
    by name. `lock` is for callers who hold the output's lock already. Raises OutputExists unless `overwrite`, OutputInUse when another run writes
    there, CheckpointError when the disk is full (what was there before is untouched) or `load` would refuse a CLIP's configuration, UsageError
    while LoRA adapters are attached, UnsupportedModel when a diffusers model has one tensor under two names, which its format can't say.
    """
    model = unwrap(model)
    recipe = next(filter(None, map(recipe_of, denoisers(model).values())), None)
    plan = next(filter(None, map(search_plan_of, denoisers(model).values())), None)
    if not hasattr(model, "save_pretrained"):
        raise UnsupportedModel(f"a {type(model).__name__} is no diffusers model, so there is no folder format for it", "save its state_dict yourself")
    for name, part in getattr(model, "components", {"": model}).items():
        if isinstance(part, nn.Module):
            if hasattr(getattr(part, "config", None), "to_diff_dict"):  # of transformers
                check_end(part.config.to_dict(), f"{name}.config", f"set pipe.{name}.config.eos_token_id to its tokenizer's")
            refuse_adapters(part, "saved: the folder would hold layers that no loader knows", UNLOAD)
            refuse_offloaded(part)
            refuse_shared(part)
    folder = Path(folder).absolute()
    check_output(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    texts = {RECIPE: recipe_yaml(recipe)} if recipe is not None else {}
    texts |= {PLAN: json.dumps(plan, indent=1) + "\n"} if plan is not None else {}
    with room(folder, needed_bytes(model)), nullcontext(lock) if lock is not None else OutputLock(folder) as held:
        if held.held:
            recover(folder)
        check_output(folder, overwrite)  # again: another run may have come first
        temporary = folder.parent / f".{folder.name}.partial-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            model.save_pretrained(temporary)
            complete_configs(model, temporary)
            for name, text in (texts | (attachments or {})).items():
                (temporary / name).write_text(text, encoding="utf-8")
            _write_manifest(temporary)
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_offloaded(part: nn.Module) -> None:
    """Raise UsageError when some of `part` is elsewhere, where accelerate's offloading puts it: there is nothing to write."""
    for path, module in part.named_modules():
        held = "qdata" if isinstance(module, QuantLinear) and not module.scale.is_meta else None  # a backend has those codes
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        away = next((name for name, tensor in tensors if tensor.is_meta and name != held), None)
        if away is not None:
            why = "it is on the meta device; accelerate's offloading puts weights elsewhere between calls"
            hint = "accelerate.hooks.remove_hook_from_module(model, recurse=True), or load the model again"
            raise UsageError(f"{path}.{away} is not in memory".lstrip("."), why, hint)


def refuse_shared(part: nn.Module) -> None:
    """Raise UnsupportedModel when a diffusers model has one tensor under two names: safetensors would, after the files before it are written."""
    from diffusers import ModelMixin

    if not isinstance(part, ModelMixin):  # models of transformers know which of theirs are tied
        return
    held: dict[tuple, list[tuple[int, int, str]]] = {}
    for name, tensor in _stored(part):
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided  # other quantizers' tensors have no storage
        if plain and not tensor.is_meta and tensor.numel() and tensor.is_contiguous():  # diffusers writes a copy of what isn't contiguous
            storage, start = tensor.untyped_storage(), tensor.data_ptr()
            place = (tensor.device, storage.data_ptr(), storage.nbytes())
            held.setdefault(place, []).append((start, start + tensor.numel() * tensor.element_size(), name))
    for spans in held.values():
        for (_, end, first), (start, _, second) in pairwise(sorted(spans)):
            if start < end:
                why = f"{first} and {second} are one tensor, and a diffusers folder holds each name's own numbers"
                hint = f"give each its own layer before quantizing (copy.deepcopy the module of {second}), or save the state_dict yourself"
                raise UnsupportedModel(why, hint, what=f"this {type(part).__name__} can't be saved")


def _stored(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What `state_dict` would list, without the copies that quantized layers make of codes that a backend holds."""
    for path, module in part.named_modules(remove_duplicate=False):
        kept = {name: tensor for name, tensor in module._buffers.items() if name not in module._non_persistent_buffers_set}
        yield from ((f"{path}.{name}".lstrip("."), tensor) for name, tensor in (module._parameters | kept).items() if tensor is not None)


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Raise before any work is done: OutputExists when `folder` is there and may not be replaced, UsageError when it is not ours to replace."""
    folder = Path(folder).absolute()
    check_writable(folder.parent)
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "only a folder can be replaced by a model", "choose another -o")
    if not overwrite:
        raise OutputExists(f"{folder} exists already", "nothing is overwritten unasked", "choose another one, or allow overwriting it (--overwrite)")
    strangers = _strangers(folder)
    if any(folder.iterdir()) and (strangers or not any((folder / name).is_file() for name in (MANIFEST, "model_index.json", "config.json"))):
        raise UsageError(
            f"{folder} holds something else than a model",
            f"--overwrite replaces the whole folder; {f'it would delete {strangers[0]}' if strangers else 'there is no model in this one'}",
            "choose another -o",
        )


def _strangers(folder: Path) -> list[str]:
    """Files that no model put there: not in the manifest, or without one of another kind than models have."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    if (folder / MANIFEST).is_file():
        return sorted(files - {*read_manifest(folder).files, MANIFEST})
    return sorted(name for name in files if PurePosixPath(name).suffix not in MODEL_SUFFIXES)


def recipe_yaml(recipe: QuantRecipe) -> str:
    """A recipe as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


def folder_bytes(folder: Path) -> int:
    """Size of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def complete_configs(model: Any, folder: Path) -> None:
    """Keep `id2label`, which `save_pretrained` drops, and no path of this machine."""
    for path in (*folder.glob("*.json"), *folder.glob("*/config.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        changed = values.pop("_name_or_path", None) is not None
        labels = getattr(model, "labels", None) if path.name == "model_index.json" else None
        if labels and "id2label" not in values:
            values["id2label"], changed = _id2label(labels), True
        if changed:
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _id2label(labels: dict[str, int]) -> dict[str, str]:
    """DiTPipeline keeps one entry a synonym; its own format joins the synonyms of an id by commas."""
    names: dict[int, list[str]] = {}
    for name, label in labels.items():
        names.setdefault(int(label), []).append(name)
    return {str(label): ", ".join(sorted(names[label])) for label in sorted(names)}


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
        files[path.relative_to(folder).as_posix()] = FileEntry(size=path.stat().st_size, sha256=file_digest(path))
        sync(path)
    manifest = Manifest(format_version=FORMAT_VERSION, dite_version=__version__, files=files)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    for directory in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(directory)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
