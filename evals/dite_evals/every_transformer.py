"""A small random model of every transformer class in the installed diffusers, shrunk by what its parameters are called.

Layers and heads become 2, the widths of texts and feed-forwards 64 and 128, and what is a multiple of the heads follows them. `OVERRIDES` is for
constructors whose defaults can't be built, or whose names say too little. It is for trying dite on them; dite itself knows no class by its name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import torch
from torch import nn

LAYERS = re.compile(r"(^|_)(num_)?\w*(layers|blocks|depth)$")
HEADS = re.compile(r"(^|_)n?heads$")
NUMBER_OF_HEADS = ("num_attention_heads", "n_heads", "nheads", "num_heads", "dit_heads")
HEADS_TIMES = ("hidden_size", "dim", "model_dim", "token_dim", "dit_dim", "caption_projection_dim")
WIDE = re.compile(
    r"ffn_dim|ff_dim|intermediate_(size|dim)|ffn_hidden_size|ff_inner_dim|approximator_hidden_dim|vocab_size|codebook_size|time_embed_hidden_dim"
)
TEXT = re.compile(
    r"(text_dim|text_embed_dim|text_embed_2_dim|joint_attention_dim|caption_channels|cap_feat_dim|context_in_dim|text_emb_dim|llm_features_dim|"
    r"text_hidden_dim|in_text_dim|in_text_dim2|condition_dim|text_in_dim|encoder_hidden_states_channels|crossattn_proj_in_channels|"
    r"cross_attention_dim|cross_attention_dim_t5|pooled_projection_dim|image_embed_dim|embedding_dim)$"
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {"attention_head_dim": 32, "caption_projection_dim": 64, "pos_embed_max_size": 64},
    "DreamLiteTransformer2DModel": {"in_channels": 64, "norm_num_groups": 8, "attention_head_dim": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [64, 64], "attention_head_dim": 64, "llama_layers": [0, 1]},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "Kandinsky5Transformer3DModel": {"model_dim": 128, "time_dim": 64},
    "Kandinsky6SRTransformer3DModel": {"model_dim": 128, "time_dim": 64, "out_visual_dim": 64},
    "Kandinsky6Transformer3DModel": {"model_dim": 128, "time_dim": 64},
    "LatteTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2, "caption_channels": 64, "cross_attention_dim": 176},
    "LuminaNextDiT2DModel": {"num_kv_heads": 2},
    "OmniGenTransformer2DModel": {
        "vocab_size": 128,
        "pad_token_id": 0,
        "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
    },
    "StableAudio3DiTModel": {"embed_dim": 128},
    "T5FilmDecoder": {"d_model": 64, "d_kv": 32, "d_ff": 128},
    "Transformer2DModel": {"in_channels": 64, "norm_num_groups": 8, "attention_head_dim": 32},
    "TransformerTemporalModel": {"in_channels": 64, "norm_num_groups": 8, "attention_head_dim": 32},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
}


def every_class() -> dict[str, type[nn.Module]]:
    """Every transformer that diffusers defines, by name."""
    from diffusers import ModelMixin
    from diffusers.models import transformers

    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{info.name}")
        mine = (one for one in vars(module).values() if inspect.isclass(one) and issubclass(one, ModelMixin) and one.__module__ == module.__name__)
        found |= {one.__name__: one for one in mine}
    return dict(sorted(found.items()))


def small_arguments(cls: type[nn.Module]) -> dict[str, Any]:
    """What to build a small one with: the parameters to change."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    numbers = {one.name: one.default for one in parameters if isinstance(one.default, int) and not isinstance(one.default, bool)}
    heads = next((numbers[name] for name in NUMBER_OF_HEADS if name in numbers), None)
    small: dict[str, Any] = {}
    for name, value in numbers.items():
        if (LAYERS.search(name) and value >= 1) or (HEADS.search(name) and value >= 2):
            small[name] = 2
        elif heads and name in HEADS_TIMES:
            small[name] = value * 2 // heads
        elif WIDE.search(name):
            small[name] = min(value, 128)
        elif TEXT.search(name):
            small[name] = min(value, 64)
    return small | OVERRIDES.get(cls.__name__, {})


def small_model(cls: type[nn.Module], most_parameters: int = 200_000_000) -> Any:
    """A model in fp32 with random weights. Raises whatever its constructor raises, and ValueError where it is not small."""
    arguments = small_arguments(cls)
    with torch.device("meta"):
        count = sum(one.numel() for one in cls(**arguments).parameters())
    if count > most_parameters:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # so that what a constructor leaves as the memory held it, some do, is NaN
    try:
        model = cls(**arguments).eval()
    finally:
        torch.use_deterministic_algorithms(before)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            nn.init.normal_(tensor, std=0.02)
    return model
