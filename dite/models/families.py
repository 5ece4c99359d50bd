"""Per-family knowledge, the only place where model names appear: the smallest inputs that a model's forward takes.

They are used to *observe* which linears see tokens. A family that is missing here still works; its linears are then told apart by structure.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

TEXT_TOKENS = 7


def example_inputs(model: nn.Module) -> Mapping[str, Any] | None:
    """Random inputs of one sample for `model`'s forward, in its dtype and on its device; None for a family we don't know."""
    builder = _BUILDERS.get(type(model).__name__)
    if builder is None:
        return None
    # Most of the parameters, not the first one: some families keep a few modules in fp32.
    sizes: Counter = Counter()
    for parameter in model.parameters():
        sizes[parameter.device, parameter.dtype] += parameter.numel()
    (device, dtype), _ = sizes.most_common(1)[0]
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs = builder(model.config, noise)
    inputs["timestep"] = torch.tensor([500], device=device)
    accepted = signature(type(model).forward).parameters
    inputs = {key: value for key, value in inputs.items() if key in accepted}
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()} | {"return_dict": False}


def known_families() -> list[str]:
    """Model classes with example inputs."""
    return sorted(_BUILDERS)


Noise = Callable[..., torch.Tensor]


def _dit(config, noise: Noise) -> dict:
    size = config.sample_size
    return {"hidden_states": noise(1, config.in_channels, size, size), "class_labels": torch.tensor([0])}


def _pixart(config, noise: Noise) -> dict:
    size = config.sample_size
    extra = config.use_additional_conditions if config.use_additional_conditions is not None else size == 128
    conditions = {"resolution": noise(1, 2), "aspect_ratio": noise(1, 1)} if extra else {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": noise(1, config.in_channels, size, size),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config.caption_channels or config.cross_attention_dim),
        "added_cond_kwargs": conditions,
    }


def _sd3(config, noise: Noise) -> dict:
    size = 4 * config.patch_size
    return {
        "hidden_states": noise(1, config.in_channels, size, size),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
    }


def _flux(config, noise: Noise) -> dict:
    inputs = {
        "hidden_states": noise(1, 16, config.in_channels),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return inputs | ({"guidance": noise(1)} if config.guidance_embeds else {})


def _wan(config, noise: Noise) -> dict:
    frames, height, width = config.patch_size
    return {
        "hidden_states": noise(1, config.in_channels, frames, 4 * height, 4 * width),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config.text_dim),
    }


def _qwen_image(config, noise: Noise) -> dict:
    return {
        "hidden_states": noise(1, 16, config.in_channels),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.bool),
        "img_shapes": [[(1, 4, 4)]],
        "txt_seq_lens": [TEXT_TOKENS],  # wanted before diffusers 0.37, gone since
    }


_BUILDERS: dict[str, Callable[[Any, Noise], dict]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
    "QwenImageTransformer2DModel": _qwen_image,
}
