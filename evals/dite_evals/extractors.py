"""Feature extractors: modules from uint8 images to feature vectors, with an identity that a distance can be quoted with.

An FID means nothing without its extractor: two numbers may be compared only if their extractors' `spec.id` agree to the letter.
Nothing is downloaded here: weights come from a folder that the user names. B images, F features.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dite.errors import CheckpointError, UsageError
from dite_evals.classifier import SmallClassifier

EXTRACT_BATCH = 250
FOLDER = "classifier"


class Extractor(nn.Module):
    """`network`: uint8 [B, 3, H, W] → [B, F]. Runs in fp32, whatever the models under test run in."""

    def __init__(self, network: nn.Module, name: str, weights_sha256: str, preprocessing: str, image_size: int | None = None):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.num_features: int = network.num_features
        self.name = name
        self.weights_sha256 = weights_sha256
        self.preprocessing = preprocessing
        self.image_size = image_size

    @property
    def id(self) -> str:
        """Name, preprocessing and weights in one string; equal only for extractors whose features may be compared."""
        return f"{self.name}/{self.preprocessing}/sha256:{self.weights_sha256}"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise UsageError(
                "these are no images for an extractor", f"got {images.dtype} {list(images.shape)}, it takes uint8 [B, 3, H, W]", "convert them first"
            )
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            raise UsageError(
                f"extractor {self.name} can't measure these images",
                f"they have {images.shape[-1]}×{images.shape[-2]} pixels, it was trained on {self.image_size}×{self.image_size} and resizes nothing",
                "use a protocol made for this model's resolution",
            )
        return self.network(images).float()

    @torch.no_grad()
    def extract(self, images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Features fp32 [N, F] of images uint8 [N, 3, H, W], in batches of fixed size (the last one padded) so that they never depend on N."""
        self.to(device)
        features = []
        for batch in images.split(EXTRACT_BATCH):
            missing = EXTRACT_BATCH - len(batch)
            padded = torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
            features.append(self(padded.to(device))[: len(batch)].cpu())
        return torch.cat(features) if features else torch.empty(0, self.num_features)


def load_classifier(folder: str | os.PathLike[str]) -> Extractor:
    """The classifier in `folder/classifier` (`config.json`, `model.safetensors`) as an extractor of its pooled features.

    Its config needs `_class_name` and `num_classes`; `name` and `image_size` have defaults. Raises CheckpointError when a file is missing,
    damaged, or doesn't fit the architecture.
    """
    home = Path(folder) / FOLDER
    config = _read_config(home / "config.json")
    weights = home / "model.safetensors"
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read {weights}", str(error), "export the model again, or reinstall dite") from error
    network = SmallClassifier(config["num_classes"])
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        odd = sorted({key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)})
        raise CheckpointError(
            f"{weights} doesn't hold this classifier",
            f"{odd[0]} is {found.get(odd[0], 'absent')}, expected {expected.get(odd[0], 'nothing')}",
            "export the model again",
        )
    if not all(value.is_floating_point() and torch.isfinite(value).all() for value in state.values()):
        raise CheckpointError(f"{weights} is damaged", "a weight is not finite", "export the model again")
    network.load_state_dict(state)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return Extractor(network, config.get("name", "small-classifier"), sha256, "uint8:[-1,1]", config.get("image_size", 32))


def save_classifier(
    classifier: SmallClassifier, folder: str | os.PathLike[str], name: str, image_size: int, dtype: torch.dtype = torch.float32, **facts: Any
) -> None:
    """Write `folder/classifier` for `load_classifier`; `facts` (accuracy, data) are kept in its config for people."""
    home = Path(folder) / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "SmallClassifier", "name": name, "num_classes": classifier.head.out_features, "image_size": image_size, **facts}
    (home / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in classifier.state_dict().items()}
    save_file(state, home / "model.safetensors", {"format": "pt"})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}", str(error), "this folder holds no classifier; use builtin:cifar10-dit") from error
    if not isinstance(config, dict) or config.get("_class_name") != "SmallClassifier":
        raise CheckpointError(f"{path} is no classifier config", "_class_name must be SmallClassifier", "export the model again")
    for key, kind in {"name": str, "num_classes": int, "image_size": int}.items():
        if not isinstance(config.get(key, "" if kind is str else 1), kind) or isinstance(config.get(key), bool):
            rule = f"{key} must be {'text' if kind is str else 'a whole number'}"
            raise CheckpointError(f"{path} is no classifier config", rule, "export the model again")
    if "num_classes" not in config:
        raise CheckpointError(f"{path} is no classifier config", "num_classes is missing", "export the model again")
    if not 1 <= config["num_classes"] <= 100_000:
        raise CheckpointError(
            f"{path} is no classifier config", f"num_classes is {config['num_classes']}, allowed are 1 to 100000", "export the model again"
        )
    return config
