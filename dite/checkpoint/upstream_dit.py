"""State dicts of the original DiT code (arXiv 2212.09748) as diffusers' DiTTransformer2DModel names them.

x_embedder.proj                    pos_embed.proj
t_embedder.mlp.{0,2}               transformer_blocks.*.norm1.emb.timestep_embedder.linear_{1,2}    one in each block: diffusers has no common one
y_embedder.embedding_table         transformer_blocks.*.norm1.emb.class_embedder.embedding_table    likewise
blocks.N.adaLN_modulation.1        transformer_blocks.N.norm1.linear
blocks.N.attn.qkv                  transformer_blocks.N.attn1.to_{q,k,v}                            cut in three
blocks.N.attn.proj, mlp.fc1, fc2   transformer_blocks.N.attn1.to_out.0, ff.net.0.proj, ff.net.2
final_layer.adaLN_modulation.1     proj_out_1
final_layer.linear                 proj_out_2

diffusers spreads the frequencies of the timestep's embedding over 127 steps where the original has 128, also for the DiTs that it converted itself:
pictures of a converted model are those of diffusers' own conversion, not the original code's to the last digit.
"""

import math
from typing import Any

import torch

from dite.errors import CheckpointError

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: DiT-S, B, L, XL
BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
SIGNS = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"}
ENDS = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}


def is_upstream_dit(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are a DiT's, by the names that no other model has together."""
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"} <= set(
        tensors
    )


def config_of(tensors: dict[str, torch.Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """What DiTTransformer2DModel is made with; everything but the heads shows in the shapes. Raises CheckpointError."""
    width, in_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    heads = num_heads or HEADS.get(width)
    if heads is None or width % heads:
        why = f"its width is {width}; known: {', '.join(map(str, HEADS))}" if heads is None else f"{heads} heads don't divide the width {width}"
        raise CheckpointError("the number of attention heads is in no file", why, "give it: --heads N")
    side = math.isqrt(tensors["pos_embed"].shape[1]) if "pos_embed" in tensors else 16
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,  # the last one means "no class"
        "norm_num_groups": next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0),  # stored, and not used
        "norm_eps": 1e-6,
    }


def renamed(tensors: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The same tensors by diffusers' names. Raises CheckpointError for one that has no place there."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ENDS:
            found[f"{ENDS[module]}.{kind}"] = tensor
        elif module in SHARED:
            found |= {f"transformer_blocks.{index}.norm1.emb.{SHARED[module]}.{kind}": tensor for index in range(num_layers)}
        elif module.startswith("blocks.") and module.split(".", 2)[2] in BLOCK:
            _, index, part = module.split(".", 2)
            found[f"transformer_blocks.{index}.{BLOCK[part]}.{kind}"] = tensor
        elif module.endswith(".attn.qkv"):
            names = (f"transformer_blocks.{module.split('.')[1]}.attn1.to_{letter}.{kind}" for letter in "qkv")
            found |= dict(zip(names, tensor.chunk(3), strict=True))
        elif name != "pos_embed":  # the same sines everywhere: diffusers makes them
            raise CheckpointError(
                f"{name} has no place in DiTTransformer2DModel", "it is no tensor of the published DiT", "convert to a .safetensors file"
            )
    return found
