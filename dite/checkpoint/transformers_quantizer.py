"""dite as a transformers quantizer: text encoders whose weights are codes are saved and loaded by their own `from_pretrained`.

transformers fills buffers in the dtype that they have before, so the scales are given their stored one first; and it casts what it keeps in fp32, by
name, codes and scales alike, so those are put back afterwards. What the files lack it makes up: such layers are refused.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

from dite.checkpoint.diffusers_quantizer import DiteConfig, check_tensors, insert_planned_, refuse_disk
from dite.checkpoint.header import read_header
from dite.errors import CheckpointError, UnsupportedEnvironment, UsageError
from dite.quant.apply import dequantize_linears_, quantized_layers
from dite.quant.plan import QuantPlan

OLDEST = 5  # before it, transformers loads quantized models in another way
SCALES = {"F32": torch.float32, "F16": torch.float16}
LOADED = "_is_hf_initialized"  # how transformers marks the tensors that it found in a file
DAMAGED = "copy or download the folder again"
OTHER = "weights and config.json are from different models"


class DiteTextQuantizer(HfQuantizer):
    """Builds empty quantized layers before the weights arrive; encoders are quantized in memory, by `dite.quantize` on their pipeline."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what the loader would fail at half-way."""
        check_transformers("a text encoder quantized by dite can't be loaded", "upgrade transformers")
        refuse_disk(device_map, "text encoder")

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            why = "transformers hands a quantizer one tensor at a time"
            raise UsageError("a text encoder can't be quantized while it is loaded", why, "load the pipeline, then dite.quantize with text_encoders")
        insert_planned_(model, self.quantization_config)
        stored = _stored([checkpoint_files] if isinstance(checkpoint_files, str) else checkpoint_files or [])
        self._scales = {name: _scale_dtype(stored, f"{name}.scale") for name in quantized_layers(model)}
        for name, layer in quantized_layers(model).items():
            layer.scale = layer.scale.to(self._scales[name])
            held = {f"{name}.{part}": tensor for part, tensor in layer.named_buffers()}
            wrong = next((key for key, tensor in held.items() if key in stored and tuple(stored[key]["shape"]) != tuple(tensor.shape)), None)
            if wrong is not None:
                why = f"it is {tuple(stored[wrong]['shape'])}; its scheme in config.json needs {tuple(held[wrong].shape)}"
                raise CheckpointError(f"{wrong} has the wrong shape", why, OTHER)
            extra = next((key for key in stored if key.startswith(name + ".") and key not in held), None)
            if extra is not None:  # transformers would only warn, and the codes would mean something else
                raise CheckpointError(f"{extra} should not be there", "the layer's scheme in config.json has no such tensor", OTHER)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers = quantized_layers(model)
        tensors = {f"{name}.{part}": tensor for name, layer in layers.items() for part, tensor in layer.named_buffers()}
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, LOADED, False)]
        if missing and len(missing) < len(tensors):  # none of them: this transformers marks them in another way
            raise CheckpointError(f"{missing[0]} is missing", f"the weights lack {len(missing)} tensors that config.json describes", DAMAGED)
        kept = _kept_in_fp32(model)
        for name, layer in layers.items():
            layer.scale = layer.scale.to(self._scales[name])
            if kept & set(name.split(".")):
                layer.float()
        check_tensors(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_linears_(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def check_transformers(what: str, hint: str) -> None:
    """Raise UnsupportedEnvironment where the installed transformers is too old for quantized encoders."""
    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise UnsupportedEnvironment(what, f"it needs transformers {OLDEST} or newer; {transformers.__version__} is installed", hint)


def mark_text_encoder_(model: nn.Module, plan: QuantPlan) -> None:
    """Make an encoder that was quantized in memory look to transformers like one it loaded: `save_pretrained` then works."""
    config = DiteConfig.of(plan, None)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = DiteTextQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config


def _stored(files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What safetensors files say of every tensor in them."""
    return {name: entry for file in files for name, entry in read_header(Path(file)).items()}


def _scale_dtype(stored: dict[str, dict[str, Any]], name: str) -> torch.dtype:
    """What the scales of a layer are stored in. Files may name its tensors otherwise than the model does: then whatever ends alike is asked; fp32,
    which holds any scale, where they disagree."""
    parts = name.split(".")
    for start in range(len(parts) - 1):
        tail = ".".join(parts[start:])
        found = {entry["dtype"] for key, entry in stored.items() if key == tail or key.endswith("." + tail)}
        if found:
            return SCALES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
    return torch.float32


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of the modules that transformers keeps in fp32 at the model's dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if model.dtype == torch.float16 else set()
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept | (strict if model.dtype in (torch.float16, torch.bfloat16) else set())
