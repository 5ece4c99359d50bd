"""Modules of diffusers that do more in one pass once their linears are quantized: a linear with its GELU, LayerNorm with adaLN, gated residuals.

A module's class is changed to a subclass of it; its state, its names and what it computes stay, up to the rounding of intermediate results, which
there are fewer of. Where the fused form can't run (another device, gradients, hooks in between), the module does what it always did.

Imported only when diffusers is there already: a model that has such modules has brought it.
"""

import os

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from dite.quant.linear import QuantLinear
from dite_kernels.cpu import block


def fuse_(module: nn.Module) -> None:
    """Let `module` do more in one pass, if it is one that can."""
    fused = {GELU: FusedGELU, AdaLayerNormZero: FusedAdaLayerNormZero, BasicTransformerBlock: FusedBlock}.get(type(module))
    if fused is not None and fused.fits(module):
        module.__class__ = fused


def unfuse_(module: nn.Module) -> None:
    """Let `module` be what it was before `fuse_`."""
    if type(module) in (FusedGELU, FusedAdaLayerNormZero, FusedBlock):
        module.__class__ = type(module).__bases__[0]


def by_its_parents_name(fused: type) -> type:
    """Some of diffusers' options (device maps, caches) find modules by the name or the registration of their class."""
    fused.__name__ = fused.__bases__[0].__name__  # pickles go by __qualname__
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        TransformerBlockRegistry.register(fused, TransformerBlockRegistry.get(fused.__bases__[0]))
    except (ImportError, AttributeError, ValueError):  # no registry in this version, or the parent is not in it
        pass
    return fused


@by_its_parents_name
class FusedGELU(GELU):
    """A linear and its GELU in one call, while that linear is quantized and nobody listens in between."""

    @staticmethod
    def fits(module: GELU) -> bool:
        """Whether the GELU is the tanh approximation."""
        return module.approximate == "tanh"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if isinstance(self.proj, QuantLinear) and not listened_to(self.proj):
            return self.proj.forward_gelu(hidden_states)
        return super().forward(hidden_states)


@by_its_parents_name
class FusedAdaLayerNormZero(AdaLayerNormZero):
    """LayerNorm, scale and shift in one pass."""

    @staticmethod
    def fits(module: AdaLayerNormZero) -> bool:
        """Whether the norm is a LayerNorm without weights."""
        return _plain(module.norm)

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if listened_to(self.norm) or runs_elsewhere(self):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return (modulate(self.norm, x, scale, shift), *others)


@by_its_parents_name
class FusedBlock(BasicTransformerBlock):
    """A DiT block: self-attention and feed-forward, each after adaLN and gated."""

    @staticmethod
    def fits(module: BasicTransformerBlock) -> bool:
        """Whether the block has these parts, and no others."""
        if module.norm_type != "ada_norm_zero" or module.attn2 is not None or module.only_cross_attention:
            return False
        return _plain(module.norm3) and module.pos_embed is None and module._chunk_size is None

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        if (
            encoder_hidden_states is not None
            or cross_attention_kwargs
            or hidden_states.ndim != 3
            or self._chunk_size
            or listened_to(self.norm3)
            or runs_elsewhere(self)
        ):
            given = (encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs, class_labels, added_cond_kwargs)
            return super().forward(hidden_states, attention_mask, *given)
        x, gate_attention, shift, scale, gate = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
        hidden_states = add_gated(hidden_states, gate_attention, self.attn1(x, attention_mask=attention_mask))
        return add_gated(hidden_states, gate, self.ff(modulate(self.norm3, hidden_states, scale, shift)))


def modulate(norm: nn.LayerNorm, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """norm(x) · (1 + scale) + shift: x [B, L, C], scale and shift [B, C]."""
    fused = block.modulate(x, scale, shift, norm.eps)
    return norm(x) * (1 + scale[:, None]) + shift[:, None] if fused is None else fused


def add_gated(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + gate · y: x and y [B, L, C], gate [B, C]."""
    fused = block.add_gated(x, gate, y)
    return gate[:, None] * y + x if fused is None else fused


def runs_elsewhere(module: nn.Module) -> bool:
    """Whether the first quantized linear in `module` was told to run on another backend than these passes are of: then all of it does."""
    layer = next((part for part in module.modules() if isinstance(part, QuantLinear)), None)
    asked = layer.backend if layer is not None and layer.backend != "auto" else os.environ.get("DITE_BACKEND") or "auto"
    return layer is None or asked not in ("auto", "cpu")


def listened_to(module: nn.Module) -> bool:
    """Whether hooks want to see what goes in or comes out."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _plain(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine
