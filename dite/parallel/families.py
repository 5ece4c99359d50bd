"""Where the tokens of a family's forward begin and end: the only place of this package where model classes are named.

Everything between is done token by token, attention excepted; so a rank that gets some of the rows computes those rows of everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dite.errors import UnsupportedModel


@dataclass(frozen=True)
class Rows:
    """Tensors with one row a token along `dim`: `of` is "input NAME" of the model's forward, "output PATH" of a module, or "first block's input".

    `items`: which entries of a tuple; None means the thing itself, or every entry.
    """

    of: str
    dim: int = 1
    items: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """`split` says where rows are chosen, `join` whose output has its rows put together again; `attentions` and `blocks` are lists of modules.

    `text`: where joint attention has the text's tokens, "first" or "last"; None without them. `batched`: whether pipelines call the model once for
    both guidance branches.
    """

    split: tuple[Rows, ...]
    join: str
    blocks: tuple[str, ...]
    attentions: tuple[str, ...] = ("attn",)
    text: str | None = None
    batched: bool = True


FAMILIES: Mapping[str, Family] = {
    "DiTTransformer2DModel": Family((Rows("output pos_embed"),), "proj_out_2", ("transformer_blocks",), ("attn1",)),
    "PixArtTransformer2DModel": Family((Rows("output pos_embed"),), "proj_out", ("transformer_blocks",), ("attn1",)),
    "SD3Transformer2DModel": Family((Rows("output pos_embed"),), "proj_out", ("transformer_blocks",), ("attn", "attn2"), "last"),
    "FluxTransformer2DModel": Family(
        (Rows("input hidden_states"), Rows("input img_ids", dim=-2)),
        "proj_out",
        ("transformer_blocks", "single_transformer_blocks"),
        text="first",
        batched=False,
    ),
    "WanTransformer3DModel": Family((Rows("first block's input"), Rows("output rope")), "proj_out", ("blocks",), ("attn1",), batched=False),
    "QwenImageTransformer2DModel": Family(
        (Rows("input hidden_states"), Rows("output pos_embed", dim=0, items=(0,))), "proj_out", ("transformer_blocks",), text="first", batched=False
    ),
}


def family_of(model: nn.Module) -> Family:
    """Raises UnsupportedModel for a class that is not listed."""
    for base in type(model).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    known = ", ".join(sorted(FAMILIES))
    raise UnsupportedModel(f"dite doesn't know where the tokens of {type(model).__name__} begin and end; it knows {known}", "use it on one device")


def blocks_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """In the order in which they run."""
    return [block for path in family.blocks for block in model.get_submodule(path)]


def attentions_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules whose queries, keys and values are rows of tokens, in the order in which they run."""
    found = [getattr(block, name) for block in blocks_of(model, family) for name in family.attentions if getattr(block, name, None) is not None]
    if not found:
        raise UnsupportedModel(f"no attention was found in {type(model).__name__}", "use it on one device")
    return found


def refusal(model: nn.Module, family: Family, inputs: Mapping[str, Any]) -> str | None:
    """Why this call can't be shared out, though others of the family can."""
    if type(model).__name__.startswith("Wan") and getattr(inputs.get("timestep"), "ndim", 1) == 2:
        return "every token has a timestep of its own (Wan 2.2 TI2V)"
    for name in ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states"):
        if inputs.get(name) is not None:
            return f"{name} add to all tokens"
    if getattr(model, "zero_cond_t", False):
        return "tokens of edited images are modulated apart (zero_cond_t)"
    return None
