"""dite as a transformers quantizer: text encoders whose weights are codes are saved and loaded by their own `from_pretrained`.

transformers fills buffers in the dtype that they have before, so the scales are given their stored one first; and it casts what it keeps in fp32, by
name, codes and scales alike, so they are put back afterwards. Missing and misshapen tensors, which it would make up, are refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from dite.checkpoint.diffusers_quantizer import DiteConfig, check_tensors, insert_planned_
from dite.checkpoint.header import read_header
from dite.errors import CheckpointError, UsageError
from dite.quant.apply import dequantize_linears_, quantized_layers
from dite.quant.linear import QuantLinear
from dite.quant.plan import QuantPlan

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
DAMAGED = "copy or download the folder again"
OTHER = "weights and config.json are from different models"


class DiteTextQuantizer(HfQuantizer):
    """Builds empty quantized layers before the weights arrive; encoders are quantized in memory, by `dite.quantize` on their pipeline."""

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            why = "transformers hands a quantizer one tensor at a time"
            raise UsageError("a text encoder can't be quantized while it is loaded", why, "load the pipeline, then dite.quantize with text_encoders")
        insert_planned_(model, self.quantization_config)
        self._stored = _stored([checkpoint_files] if isinstance(checkpoint_files, str) else checkpoint_files or [])
        for name, layer in quantized_layers(model).items():
            self._check(name, layer)
            layer.scale = layer.scale.to(self._stored[f"{name}.scale"].dtype)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        kept = _kept_in_fp32(model)
        for name, layer in quantized_layers(model).items():
            layer.scale = layer.scale.to(self._stored[f"{name}.scale"].dtype)
            if kept & set(name.split(".")):
                layer.float()
        check_tensors(model)
        return model

    def _check(self, name: str, layer: QuantLinear) -> None:
        """Raise CheckpointError unless the files hold just what `layer` holds."""
        tensors = {f"{name}.{part}": tensor for part, tensor in layer.named_buffers()}
        for key, tensor in tensors.items():
            if key not in self._stored:
                raise CheckpointError(f"{key} is missing", "the weights lack this tensor", DAMAGED)
            stored = self._stored[key]
            if tuple(stored.shape) != tuple(tensor.shape):
                raise CheckpointError(f"{key} has the wrong shape", f"it is {stored.shape}; its scheme needs {tuple(tensor.shape)}", OTHER)
            if (stored.dtype == torch.uint8) != (tensor.dtype == torch.uint8) or (key.endswith(".scale") and stored.dtype == torch.bfloat16):
                raise CheckpointError(f"{key} has the wrong dtype", f"it is {stored.dtype}, a layer holds {tensor.dtype} there", OTHER)
        extra = next((key for key in self._stored if key.startswith(name + ".") and key not in tensors), None)
        if extra is not None:
            raise CheckpointError(f"{extra} should not be there", "the layer's scheme in config.json has no such tensor", OTHER)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_linears_(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def mark_text_encoder_(model: nn.Module, plan: QuantPlan) -> None:
    """Make an encoder that was quantized in memory look to transformers like one it loaded: `save_pretrained` then works."""
    config = DiteConfig.of(plan, None)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = DiteTextQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor; `dtype` None for one that no layer of ours holds."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def _stored(files: Iterable[str]) -> dict[str, Stored]:
    """Every tensor of some safetensors files."""
    return {name: Stored(DTYPES.get(entry["dtype"]), tuple(entry["shape"])) for file in files for name, entry in read_header(Path(file)).items()}


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of the modules that transformers keeps in fp32 at the model's dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if model.dtype == torch.float16 else set()
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept | (strict if model.dtype in (torch.float16, torch.bfloat16) else set())
