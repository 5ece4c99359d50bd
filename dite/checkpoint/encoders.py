"""Parts of a pipeline that are models of transformers: text encoders, and image encoders.

transformers fills whatever a file lacks with random numbers, and says so in a log line; a pipeline then draws from noise. So its own report of what
it found is read, after the configuration has been held against the size of the files.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dite.checkpoint.diffusers_quantizer import DiteConfig, insert_planned_
from dite.checkpoint.fields import KINDS
from dite.checkpoint.header import numel, stored_tensors
from dite.checkpoint.index import check_values
from dite.checkpoint.skeleton import REFUSED, check_tables, described
from dite.checkpoint.strict_json import leaves
from dite.errors import CheckpointError, first_line

AT_LEAST_ONE = ("size", "dim", "heads", "layers", "channels", "distance", "buckets", "positions", "position_embeddings")
NEVER_NULL = ("_eps", "_epsilon", "hidden_size", "vocab_size", "_layers", "_heads")
DAMAGED = "copy or download the folder again"


def check_encoder(place: Path, file: str, class_name: str, sealed: bool) -> int:
    """Check a part's configuration against its files, before anything is allocated; returns how many tensors they hold.

    Raises CheckpointError that names `file`, the configuration. `sealed`: `dite.save` wrote it.
    """
    values, stored, cls = check_values(place / "config.json", "transformers", file), stored_tensors(place), _class(class_name)
    _check_kernels(values, file)
    ours = _our_config(values, file)
    if cls is None or ("quantization_config" in values and ours is None):
        return len(stored)
    if sealed:
        _check_fields(cls.config_class, values, file)
        check_end(values, file, DAMAGED)
    if ours is not None and not (values.get("dtype") or values.get("torch_dtype")):
        raise CheckpointError(f"{file}: dtype is missing", "without it the type of the scales would decide what is computed in", DAMAGED)
    with described(file, class_name, len(stored)):
        skeleton = cls(cls.config_class.from_dict({key: value for key, value in values.items() if key != "quantization_config"}))
        if ours is not None:
            insert_planned_(skeleton, ours)
    _check_size(skeleton.state_dict(keep_vars=True), stored, file)
    check_tables(skeleton, stored, file)
    return len(stored)


def positions_of(folder: Path, tokenizer: str) -> int | None:
    """How many tokens the text encoder beside a tokenizer has places for, if it is a CLIP; others have places for any number, or say more than
    they mean."""
    part = tokenizer.replace("tokenizer", "text_encoder")
    config = folder / part / "config.json"
    values = check_values(config, "transformers", f"{part}/config.json") if part != tokenizer and config.is_file() else {}
    found = values.get("max_position_embeddings") if values.get("model_type") == "clip_text_model" else None
    return found if type(found) is int and found > 0 else None


def check_end(values: dict[str, Any], label: str, hint: str) -> None:
    """Raise CheckpointError for a CLIP that looks for the end of a text at a word that can't be there: it would read elsewhere and say nothing."""
    from transformers import CLIPTextConfig

    if values.get("model_type") != "clip_text_model":
        return
    known = CLIPTextConfig().to_dict() | {key: value for key, value in values.items() if value is not None}
    end = known["eos_token_id"] if "eos_token_id" not in values else values["eos_token_id"]
    if type(end) is not int or not 0 <= end < known["vocab_size"] or end == known["bos_token_id"]:
        why = f"it is one of {known['vocab_size']} words, and not {known['bos_token_id']}, which begins a text"
        raise CheckpointError(f"{label}: eos_token_id is {end}", why, hint)


def _check_size(state: dict[str, torch.Tensor], stored: dict[str, dict[str, Any]], file: str) -> None:
    """Raise CheckpointError unless the files can hold `state`. They may name tensors otherwise, which transformers knows how to read: then only the
    sum of all numbers counts here."""
    where = file.removesuffix("config.json") + "*.safetensors"
    wrong = next((name for name, tensor in state.items() if name in stored and tuple(stored[name]["shape"]) != tuple(tensor.shape)), None)
    if wrong is not None:
        why = f"it is {tuple(stored[wrong]['shape'])} in {where}; {file} needs {tuple(state[wrong].shape)}"
        raise CheckpointError(f"{wrong} has the wrong shape", why, REFUSED)
    needed = sum({id(tensor): tensor.numel() for tensor in state.values()}.values())
    held = sum(numel(entry) for entry in stored.values())
    if needed > held:
        tied = {id(state[name]) for name in stored if name in state}
        lacking = next((name for name, tensor in state.items() if name not in stored and id(tensor) not in tied), "some tensor")
        raise CheckpointError(f"{lacking} is missing", f"{file} describes a model of {needed} numbers, {where} hold {held}", REFUSED)


def load_encoder(place: Path, class_name: str, dtype: torch.dtype | None, sealed: bool) -> nn.Module | None:
    """The model in `place`, as diffusers would load it; None for a class that transformers has no such loader for.

    Raises CheckpointError that names a tensor which the files lack; where they are `sealed`, or codes of ours, also one that they have too many.
    """
    import transformers
    from packaging.version import Version

    cls = _class(class_name)
    if cls is None:
        return None
    named = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    wanted = {named: dtype, "use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": True, "output_loading_info": True}
    model, found = cls.from_pretrained(place, **wanted)
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing or found["error_msgs"]:
        what = f"{place.name}: {missing[0]}" if missing else place.name
        why = f"its files lack the tensor, or it has another shape there; {len(missing)} such" if missing else str(found["error_msgs"])
        raise CheckpointError(f"{what} is missing", why, REFUSED)
    extra = sorted(found["unexpected_keys"])
    if extra and (sealed or getattr(model, "quantization_method", None) == "dite"):
        raise CheckpointError(f"{place.name}: {extra[0]} should not be there", "config.json describes no such tensor", REFUSED)
    return model


def _class(name: str) -> type | None:
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class is not None else None


def _our_config(values: dict[str, Any], file: str) -> DiteConfig | None:
    """How dite quantized this part; None for one that it did not. Encoders are quantized weight-only, and nothing else is believed of them."""
    if "quantization_config" not in values:
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = values["quantization_config"]
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING or (method != "dite" and "format_version" in stored):
        raise CheckpointError("quantization_config can't be read", f"in {file}, quant_method is {method!r}", "is config.json damaged?")
    if method != "dite":
        return None
    try:
        config = DiteConfig.from_dict(stored)
    except (CheckpointError, ValidationError, TypeError) as error:
        why = error.why if isinstance(error, CheckpointError) else first_line(error)
        raise CheckpointError(f"{file}: quantization_config can't be read", why, "is config.json damaged?") from error
    for name, scheme in config.plan.layers.items():
        if scheme.activation is not None or scheme.rank or scheme.transform.kind != "none":
            why = f"{name} is more than rounded, which text encoders never are"
            raise CheckpointError(f"{file}: quantization_config can't be believed", why, "is config.json damaged?")
    return config


def _check_kernels(values: dict[str, Any], file: str) -> None:
    """A configuration may name attention kernels, which transformers would fetch from a hub and run."""
    for key, value in leaves(values):
        if key.rpartition(".")[2].lstrip("_") in ("attn_implementation", "experts_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{file}: {key} is {value[:80]!r}", "code from a hub is not run", "remove the key")


def _check_fields(config_class: type, values: dict[str, Any], file: str) -> None:
    """Raise CheckpointError for a value of another kind than the class's default, or a size below 1. Keys it doesn't know are let be: those of other
    versions, and of generation, are kept by every save."""
    try:
        defaults = config_class().to_dict()
    except Exception:  # some can't be made without arguments
        return
    for key, value in values.items():
        default = defaults.get(key)
        if default is not None and value is None and key.endswith(NEVER_NULL):
            raise CheckpointError(f"{file}: {key} is null", "it is a number", DAMAGED)
        if default is None or value is None or key.startswith("_"):
            continue
        wanted, kind = KINDS.get(type(default)), KINDS.get(type(value))
        if wanted in ("flag", "number", "text") and kind != wanted:
            raise CheckpointError(f"{file}: {key} is a {kind}", f"it must be a {wanted}", DAMAGED)
        sized = key.endswith(AT_LEAST_ONE) or key.startswith(("d_", "num_"))
        if sized and type(default) is int and default > 0 and value < 1:
            raise CheckpointError(f"{file}: {key} is {value}", "it is a whole number from 1", DAMAGED)
