"""DINOv2 and CLIP as extractors, from a local transformers folder (`config.json` and safetensors); nothing is downloaded and no code of the
folder runs.

    dinov2   features: the class token after the last LayerNorm (Oquab et al. 2023); the FD-DINOv2 of Stein et al. 2023, arXiv 2306.04675
    clip     features: the image embedding, projected and not normalised (Radford et al. 2021); as clean-fid's and CMMD's

The whole image is resized to the tower's square, none of it is cropped away. Mean, deviation and (for DINOv2, which takes any) the size come
from `preprocessor_config.json` where there is one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dite.errors import CheckpointError, UnsupportedEnvironment, UsageError
from dite_evals.extractors import Extractor
from dite_evals.resize import Resize, resize
from dite_evals.weights import read_weights, weights_sha256

HINT = "give a complete folder as transformers' save_pretrained writes it: config.json and model.safetensors"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "clip": "CLIPVisionModelWithProjection"}
CLASSES["clip_vision_model"] = CLASSES["clip"]
OF_TEXT = ("text_model.", "text_projection.", "logit_scale")
UNSEEN_IN_SHAPES = ("patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")


class VisionTower(nn.Module):
    """`forward`: uint8 images [B, 3, H, W] → features [B, F]."""

    batch_size = 50

    def __init__(self, model: nn.Module, num_features: int, size: int, how: Resize, scaling: tuple[tuple[float, ...], tuple[float, ...]]):
        super().__init__()
        self.model = model
        self.num_features = num_features
        self.size = size
        self.how = how
        self.register_buffer("mean", torch.tensor(scaling[0])[:, None, None] * 255, persistent=False)
        self.register_buffer("deviation", torch.tensor(scaling[1])[:, None, None] * 255, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (resize(images, self.size, self.how) - self.mean) / self.deviation
        found = self.model(pixel_values=x)
        return found.image_embeds if hasattr(found, "image_embeds") else found.pooler_output


def load_tower(kind: str, folder: str | os.PathLike[str] | None, how: Resize = "clean") -> Extractor:
    """The extractor of a local folder; `kind` is dinov2 or clip. Raises UsageError without a folder or for another kind of model,
    UnsupportedEnvironment without transformers, CheckpointError for a folder that is damaged or lacks weights."""
    if folder is None:
        raise UsageError(
            f"extractor {kind} needs its weights",
            "none were given, and dite downloads nothing by itself",
            f"--weights FOLDER, or --set weights=FOLDER of a protocol; {HINT}",
        )
    home = Path(folder)
    if not home.is_dir():
        raise UsageError(f"no folder {home}", f"extractor {kind} is a transformers folder", HINT)
    config = _read_json(home / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES or not model_type.startswith(kind):
        raise UsageError(f"{home} holds no {kind}", f"model_type in its config.json is {model_type!r}", f"use a folder of {kind}")
    transformers = _transformers()
    stored = _stored(home)
    model = _load(transformers, CLASSES[model_type], home, config)
    preprocessor = _read_json(home / "preprocessor_config.json") if (home / "preprocessor_config.json").is_file() else {}
    size = model.config.image_size if kind == "clip" else _side(preprocessor.get("crop_size"), model.config.image_size)
    if not isinstance(size, int) or size < 1 or size % model.config.patch_size:
        raise CheckpointError(f"{home} can't be used", f"images of {size} pixels are no multiple of its patches of {model.config.patch_size}", HINT)
    scaling = _scaling(preprocessor, OPENAI if kind == "clip" else IMAGENET, home)
    width = model.config.projection_dim if kind == "clip" else model.config.hidden_size
    used = {key: value for key, value in stored.items() if not key.startswith(OF_TEXT)}
    facts = [f"{name}={getattr(model.config, name)}" for name in UNSEEN_IN_SHAPES]
    numbers = ":".join(f"{name}{','.join(f'{value:g}' for value in values)}" for name, values in zip(("mean", "std"), scaling, strict=True))
    tower = VisionTower(model, width, size, how, scaling)
    return Extractor(tower, model_type, weights_sha256(used, *facts), f"{how}{size}:{numbers}", size if how == "none" else None)


def _load(transformers: ModuleType, name: str, home: Path, config: dict[str, Any]) -> nn.Module:
    """The model with every weight from the files: transformers would fill a missing one with noise, and only warn."""
    cls = getattr(transformers, name)
    more = {}
    try:
        if config["model_type"] == "clip":  # the width of the projection is the outer configuration's
            vision = dict(config.get("vision_config") or {}) | {"projection_dim": config.get("projection_dim", 512)}
            more["config"] = transformers.CLIPVisionConfig.from_dict(vision)
        with _quiet(transformers):
            model, found = cls.from_pretrained(home, local_files_only=True, use_safetensors=True, output_loading_info=True, **more)
    except Exception as error:  # whatever transformers raises on a folder it can't read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"can't load {home}", reason, HINT) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(f"{home} is incomplete", f"{len(missing)} weights are missing, {missing[0]} among them", HINT)
    odd = next((key for key, value in model.state_dict().items() if not torch.isfinite(value).all()), None)
    if odd is not None:
        raise CheckpointError(f"{home} is damaged", f"a weight of {odd} is not finite", HINT)
    return model


def _stored(home: Path) -> dict[str, torch.Tensor]:
    """The tensors as they lie on disk: their names there are stable, those inside transformers change with its version."""
    index = home / "model.safetensors.index.json"
    if not index.is_file():
        return read_weights(home / "model.safetensors", HINT)
    names = _read_json(index).get("weight_map")
    files = sorted(set(names.values())) if isinstance(names, dict) else []
    if not files or not all(isinstance(name, str) and name == Path(name).name for name in files):
        raise CheckpointError(f"{index} is damaged", "weight_map must name the files beside it", HINT)
    return {key: value for name in files for key, value in read_weights(home / name, HINT).items()}


def _side(size: Any, default: int) -> Any:
    """A side in pixels from `{"height": 224, "width": 224}`, `{"shortest_edge": 224}`, 224, or nothing."""
    if isinstance(size, dict):
        return size.get("height", size.get("shortest_edge"))
    return default if size is None else size


def _scaling(preprocessor: dict[str, Any], default: tuple, home: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation a channel, for pixels in 0..1."""
    found = (preprocessor.get("image_mean", default[0]), preprocessor.get("image_std", default[1]))
    numbers = all(isinstance(part, list | tuple) and len(part) == 3 and all(isinstance(x, float | int) for x in part) for part in found)
    if not numbers or min(found[1]) <= 0:
        why = f"image_mean and image_std must be three numbers each, the latter above 0, not {found[0]} and {found[1]}"
        raise CheckpointError(f"{home / 'preprocessor_config.json'} can't be used", why, HINT)
    return tuple(found[0]), tuple(found[1])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}", str(error), HINT) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"can't read {path}", "it is no JSON object", HINT)
    return document


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedEnvironment("this extractor can't run here", f"transformers is missing ({error})", "pip install transformers") from error
    return transformers


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No bars and no tables about the text half that is left out; the loading report itself is checked."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
