"""Feature extractors: modules from uint8 images to feature vectors, with an identity that a distance can be quoted with.

    a folder, builtin:NAME    its small classifier       32×32, as they are; 192 features
    inception                 TensorFlow's Inception-v3  299×299, resized `legacy` (ADM, the first FID) or `clean` (clean-fid); 2048 features
    dinov2, clip              their image towers         the tower's size, resized `clean`

An FID means nothing without its extractor: two numbers may be compared only if their extractors' `id` agree to the letter.
Nothing is downloaded here: weights come from a file or a folder that the user names. B images, F features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dite.errors import CheckpointError, NonFiniteOutput, UsageError
from dite_evals.classifier import SmallClassifier
from dite_evals.resize import RESIZES, Resize
from dite_evals.weights import fit_, read_weights

EXTRACT_BATCH = 50
FOLDER = "classifier"
NAMED = ("inception", "dinov2", "clip")
AGAIN = "export the model again"


class Extractor(nn.Module):
    """`network`: uint8 [B, 3, H, W] → [B, F]. Runs in fp32, whatever the models under test run in.

    A network may have `outputs`, which gives more than `features` by name: `logits` [B, C] for the inception score, `spatial` [B, 2023] for
    sFID. Its `batch_size` is how many images it is given at a time; the last bits of a feature may depend on it.
    """

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

    @property
    def batch_size(self) -> int:
        return getattr(self.network, "batch_size", EXTRACT_BATCH)

    @property
    def num_spatial(self) -> int | None:
        """Width of the features for sFID; None where the network has none."""
        return getattr(self.network, "num_spatial", None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._check(images)
        return self.network(images).float()

    def extract(self, images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Features fp32 [N, F] of images uint8 [N, 3, H, W], in batches of fixed size (the last one padded) so that they never depend on N."""
        return self.extract_all(images, device)["features"]

    def extract_all(self, images: torch.Tensor, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """`features` [N, F] and whatever else the network gives (`spatial`, `logits`), fp32 on the CPU. Raises NonFiniteOutput."""
        found = list(self.outputs(images.split(self.batch_size), device)) if len(images) else []
        if not found:
            return {"features": torch.empty(0, self.num_features)}
        return {kind: torch.cat([part[kind] for part in found]) for kind in found[0]}

    def outputs(self, batches: Iterable[torch.Tensor], device: torch.device | str = "cpu") -> Iterator[dict[str, torch.Tensor]]:
        """The same of one batch after the other, each of `batch_size` images but for the last."""
        self.to(device)
        start = 0
        for batch in batches:
            found = self._outputs(batch, device)
            for kind, values in found.items():
                _check_finite(values, start, f"{kind} of extractor {self.name}")
            yield found
            start += len(batch)

    @torch.no_grad()
    def _outputs(self, batch: torch.Tensor, device: torch.device | str) -> dict[str, torch.Tensor]:
        self._check(batch)
        missing = self.batch_size - len(batch)
        assert missing >= 0, f"a batch of {len(batch)} images where {self.batch_size} are the most"
        padded = torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
        with _exact_convolutions(device):
            images = padded.contiguous().to(device)  # channels last would sum in another order
            found = self.network.outputs(images) if hasattr(self.network, "outputs") else {"features": self.network(images)}
        return {kind: values[: len(batch)].float().cpu() for kind, values in found.items()}

    def _check(self, images: torch.Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise UsageError(
                "these are no images for an extractor", f"got {images.dtype} {list(images.shape)}, it takes uint8 [B, 3, H, W]", "convert them first"
            )
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            raise UsageError(
                f"extractor {self.name} can't measure these images",
                f"they have {images.shape[-1]}×{images.shape[-2]} pixels, it takes {self.image_size}×{self.image_size} and resizes nothing",
                "use a protocol made for this model's resolution, or an extractor that resizes",
            )


def load_extractor(name: str, weights: str | os.PathLike[str] | None = None, how: Resize | None = None) -> Extractor:
    """`inception`, `dinov2` or `clip` with `weights` (a file, or a folder for the latter two), or the classifier in the folder `name`.

    `how` they resize: legacy for Inception and clean for the towers unless given; the classifier resizes nothing. Raises UsageError,
    CheckpointError, UnsupportedEnvironment.
    """
    if how is not None and how not in RESIZES:
        raise UsageError(f"unknown resize {how}", f"known: {', '.join(RESIZES)}", "legacy is ADM's, clean is clean-fid's")
    if name == "inception":
        from dite_evals.inception import load_inception

        return load_inception(weights, how or "legacy")
    if name in NAMED:
        from dite_evals.vision_towers import load_tower

        return load_tower(name, weights, how or "clean")
    if weights is not None:
        raise UsageError(
            "weights don't go with this extractor", f"{name} is a folder that holds its own", f"leave them out, or use {', '.join(NAMED)}"
        )
    if how not in (None, "none"):
        raise UsageError("a classifier resizes nothing", f"resize is {how}", f"leave it out, or use {', '.join(NAMED)}")
    return load_classifier(name)


def load_classifier(folder: str | os.PathLike[str]) -> Extractor:
    """The classifier in `folder/classifier` (`config.json`, `model.safetensors`) as an extractor of its pooled features.

    Its config needs `_class_name` and `num_classes`; `name` and `image_size` have defaults. Raises CheckpointError when a file is missing,
    damaged, or doesn't fit the architecture.
    """
    home = Path(folder) / FOLDER
    config = _read_config(home / "config.json")
    weights = home / "model.safetensors"
    state = read_weights(weights, "export the model again, or reinstall dite")
    network = SmallClassifier(config["num_classes"])
    fit_(network, state, weights, AGAIN)
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
        raise CheckpointError(f"{path} is no classifier config", "_class_name must be SmallClassifier", AGAIN)
    for key, kind in {"name": str, "num_classes": int, "image_size": int}.items():
        if not isinstance(config.get(key, "" if kind is str else 1), kind) or isinstance(config.get(key), bool):
            rule = f"{key} must be {'text' if kind is str else 'a whole number'}"
            raise CheckpointError(f"{path} is no classifier config", rule, AGAIN)
    if "num_classes" not in config:
        raise CheckpointError(f"{path} is no classifier config", "num_classes is missing", AGAIN)
    if not 1 <= config["num_classes"] <= 100_000:
        raise CheckpointError(f"{path} is no classifier config", f"num_classes is {config['num_classes']}, allowed are 1 to 100000", AGAIN)
    return config


def _check_finite(values: torch.Tensor, start: int, what: str) -> None:
    """Raise NonFiniteOutput that names the first image of the batch, which begins at `start`, with NaN or infinity."""
    bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        raise NonFiniteOutput(
            f"the {what} are not finite", f"image {start + int(bad[0])} gave NaN or infinity, {len(bad)} of its batch did", "check the weights"
        )


def _exact_convolutions(device: torch.device | str) -> AbstractContextManager:
    """Convolutions in true fp32 on a GPU: cuDNN's default, TF32, keeps 10 bits of each factor."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False) if on_gpu else nullcontext()
