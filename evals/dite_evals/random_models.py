"""Models of the usual sizes with random weights: size, memory and time don't depend on what the weights are."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from dite.errors import UsageError, did_you_mean

SIZES: dict[str, dict[str, Any]] = {  # keyword arguments of DiTTransformer2DModel
    "dit-xl-2": {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "sample_size": 32,
        "patch_size": 2,
    },
}


def size_of(name: str, tokens: int) -> dict[str, Any]:
    """The configuration of a size, for pictures of `tokens` patches. Raises UsageError."""
    if name not in SIZES:
        raise UsageError(f"no size {name}", f"known: {', '.join(SIZES)}", did_you_mean(name, SIZES) or "for example --size dit-xl-2")
    side = isqrt(max(tokens, 0))
    if tokens < 1 or side * side != tokens:
        raise UsageError(f"{tokens} tokens make no square picture", "side × side patches of one token each", "for example --tokens 256 or 1024")
    return SIZES[name] | {"sample_size": side * SIZES[name]["patch_size"]}


def random_dit(size: dict[str, Any], num_layers: int | None = None) -> Any:
    """A DiTTransformer2DModel in bf16, built in bf16 so that building it needs no more memory than it takes."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return DiTTransformer2DModel(**size | ({"num_layers": num_layers} if num_layers else {})).to(dtype=torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(before)


def tiny_pipeline() -> Any:
    """A class-conditional pipeline as small as they come: 2 blocks of width 20, autoencoder and scheduler, two classes."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 20, "num_layers": 2, "sample_size": 4, "norm_num_groups": 2}
    transformer = DiTTransformer2DModel(in_channels=4, out_channels=4, **sizes).eval()
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(4,)).eval()
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(), id2label={0: "cat", 1: "dog"})
