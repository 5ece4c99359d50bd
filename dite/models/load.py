"""From what a user types (a folder, a hub id, `builtin:NAME`) to a model in memory."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dite.checkpoint.format import check_folder
from dite.checkpoint.header import read_header, visible
from dite.errors import CheckpointError, DiteError, UnsupportedEnvironment, UsageError, first_line, is_out_of_memory
from dite.models.builtin import builtin_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(source: str | Path, *, dtype: str | torch.dtype | None = None, device: str = "cpu") -> Any:
    """A diffusers pipeline, or a bare model for a model folder, on `device`.

    `dtype` None keeps each transformer's stored dtype (diffusers alone would make everything fp32). A folder with a dite manifest is verified
    first. Raises UsageError when there is no such folder, CheckpointError when it can't be loaded.
    """
    folder = resolve(source)
    parse_device(device)
    wanted = parse_dtype(dtype)
    sealed = isinstance(folder, Path) and check_folder(folder)
    if isinstance(folder, Path):
        wanted = wanted or stored_dtype(folder)
    return complete(from_pretrained(folder, wanted, sealed), folder, sealed).to(device)


def resolve(source: str | Path) -> Path | str:
    """A folder for `builtin:NAME` and for existing paths, the text itself for a hub id. Raises UsageError otherwise."""
    text = str(source)
    if text.startswith("builtin:"):
        return builtin_folder(text.removeprefix("builtin:"))
    path = Path(source)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("model_index.json", "config.json")):
            raise UsageError(f"{text} holds no model", "a model folder has model_index.json (a pipeline) or config.json (a model)", "check the path")
        return path
    if path.is_file():
        raise UsageError(
            f"{text} is a file",
            "single-file checkpoints are not supported; a model is a diffusers folder",
            "convert it with diffusers' from_single_file and save_pretrained",
        )
    if HUB_ID.fullmatch(text) and not path.parent.is_dir():
        return text
    raise UsageError(
        f"no model at {text}",
        "it is neither a folder, nor a hub id of the form owner/name, nor builtin:NAME",
        "check the path, or try builtin:cifar10-dit",
    )


def from_pretrained(source: Path | str, dtype: torch.dtype | None = None, sealed: bool = False) -> Any:
    """diffusers' own loading of a pipeline folder, a model folder, or a hub id, with our errors; safetensors only, never a pickle.

    What a folder says of itself is checked first (`dite.checkpoint.structure`); `sealed` is whether its manifest was.
    """
    import diffusers

    from dite.checkpoint.skeleton import module_limit
    from dite.checkpoint.structure import check_structure

    default = torch.get_default_dtype()
    tensors = check_structure(source, sealed) if isinstance(source, Path) else 0
    try:
        with module_limit(tensors, str(source)) if isinstance(source, Path) else nullcontext():
            if isinstance(source, Path) and not (source / "model_index.json").is_file():
                return _model_class(source).from_pretrained(source, use_safetensors=True, **_dtype(dtype))
            parts = _transformers_parts(source, dtype, sealed) if isinstance(source, Path) else {}
            return diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True, **_dtype(dtype), **_labels(source), **parts)
    except DiteError:
        raise
    except Exception as error:  # whatever diffusers raises on a folder it can't read
        if is_out_of_memory(error):
            raise DiteError(f"not enough memory to load {source}", first_line(error), "close other programs, or give it more memory") from error
        hint = "is the folder complete, and made by diffusers' save_pretrained or dite.save?"
        if not isinstance(source, Path):
            hint = "check the name and the connection to the hub, or give a folder that was downloaded before"
        raise CheckpointError(f"can't load {source}", first_line(error), hint) from error
    finally:
        torch.set_default_dtype(default)  # diffusers leaves it changed when a model's constructor raises


def complete(model: Any, source: Any, sealed: bool = False) -> Any:
    """`model`, if every tensor of it was in the files, and finite where they are `sealed`. Raises CheckpointError that names the tensor."""
    from dite.checkpoint.diffusers_quantizer import check_finite

    for name, part in getattr(model, "components", {"": model}).items():
        tensors = (*part.named_parameters(), *part.named_buffers()) if isinstance(part, torch.nn.Module) else ()
        missing = next((key for key, tensor in tensors if tensor.is_meta), None)
        if missing is not None:
            where = f"{name}.{missing}" if name else missing
            raise CheckpointError(
                f"can't load {source}", f"its files lack the tensor {where}, or config.json is another model's", "download it again"
            )
        if sealed and isinstance(part, torch.nn.Module) and not getattr(part, "is_quantized", False):  # the quantizer has checked those
            check_finite(part)
    return model


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that holds most of the transformer's floats on disk; None when it can't be told."""
    root = next((folder / name for name in ("transformer", ".") if visible(folder / name, "*.safetensors")), None)
    if root is None:
        return None
    counts: dict[torch.dtype, int] = {}
    for file in visible(root, "*.safetensors"):
        for name, entry in read_header(file).items():
            dtype = STORED_DTYPES.get(entry.get("dtype"))
            if dtype and not name.endswith(".scale"):
                counts[dtype] = counts.get(dtype, 0) + entry["data_offsets"][1] - entry["data_offsets"][0]
    return max(counts, key=counts.get, default=None)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`bfloat16` and the like, or a torch dtype."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype}", f"known: {', '.join(DTYPES)}", "for example --dtype bfloat16")
    return DTYPES[dtype]


def parse_device(device: str | torch.device) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`. Raises UsageError for anything else, UnsupportedEnvironment where there is no such card."""
    text = str(device)
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise UsageError(f"unknown device {text!r}", "dite runs on cpu, cuda, or one card as cuda:0, cuda:1 and so on", "for example --device cpu")
    cards = torch.cuda.device_count()
    if text != "cpu" and int(match[1] or 0) >= cards:
        built = "" if torch.version.cuda or torch.version.hip else "; this torch was built without CUDA"
        raise UnsupportedEnvironment(f"no device {text} here", f"torch sees {cards} CUDA devices{built}", "use --device cpu, or see `dite doctor`")
    return torch.device(text)


def _transformers_parts(folder: Path, dtype: torch.dtype | None, sealed: bool) -> dict[str, Any]:
    """The parts that transformers loads: models, each with every tensor that it needs, and tokenizers. Errors name the part."""
    from dite.checkpoint.encoders import load_encoder, positions_of
    from dite.checkpoint.index import check_pipeline, kind_of
    from dite.checkpoint.tokenizers import load_tokenizer

    loaded = {}
    for name, (library, class_name) in check_pipeline(folder, sealed).items():
        kind = kind_of(library, class_name)
        try:
            if kind == "transformers":
                loaded[name] = load_encoder(folder / name, class_name, dtype, sealed)
            elif kind is None:
                loaded[name] = load_tokenizer(folder / name, class_name, positions_of(folder, name))
        except DiteError:
            raise
        except ImportError as error:
            raise UnsupportedEnvironment(f"{name} can't be loaded", first_line(error), "install what is missing") from error
        except Exception as error:  # whatever transformers raises on files it can't read
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{name} can't be loaded", first_line(error), "copy or download the folder again") from error
    return {name: part for name, part in loaded.items() if part is not None}


def _dtype(dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype argument by its name in the installed diffusers, which warns about `torch_dtype` since it has a message to warn with."""
    from diffusers.utils import deprecation_utils

    renamed = hasattr(deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE")
    return {} if dtype is None else {"dtype" if renamed else "torch_dtype": dtype}


def _labels(source: Path | str) -> dict[str, dict[int, str]]:
    """`id2label` with integer keys: JSON has strings only, and diffusers warns about those at every load."""
    stored = json.loads((source / "model_index.json").read_text(encoding="utf-8")).get("id2label") if isinstance(source, Path) else None
    return {"id2label": {int(label): name for label, name in stored.items()}} if isinstance(stored, dict) else {}


def _model_class(folder: Path) -> type:
    import diffusers

    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
    cls = getattr(diffusers, name, None) if name else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise CheckpointError(
            f"{folder} holds no diffusers model", f"config.json names the class {name or '(none)'!s}", "dite loads models of the installed diffusers"
        )
    return cls
