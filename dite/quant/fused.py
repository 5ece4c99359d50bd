"""Modules of diffusers whose work a quantized linear can do along the way."""

import sys
from typing import Any

import torch
from torch import nn

from dite.quant.linear import QuantLinear


def fuse_(module: nn.Module) -> None:
    """Let `module` use what its quantized linear can do besides; anything else stays as it is, and so does every module's state."""
    activations = sys.modules.get("diffusers.models.activations")  # a model that has them has loaded them
    if activations is not None and type(module) is activations.GELU and module.approximate == "tanh":
        module.__class__ = _fused_gelu(activations.GELU)


def _fused_gelu(gelu: type) -> type:
    """The one subclass of diffusers' GELU, made when it is first needed: this module is imported without diffusers too."""
    if "FusedGELU" not in globals():

        class FusedGELU(gelu):
            """A linear and its GELU in one call while that linear is quantized and nobody listens in between."""

            def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
                if alone(self.proj):
                    return self.proj.forward_gelu(hidden_states)
                return super().forward(hidden_states)

        FusedGELU.__qualname__ = "FusedGELU"
        globals()["FusedGELU"] = FusedGELU
    return globals()["FusedGELU"]


def __getattr__(name: str) -> Any:
    # A pickled model names this class, and may be read by a process that has fused nothing yet.
    if name == "FusedGELU":
        from diffusers.models.activations import GELU

        return _fused_gelu(GELU)
    raise AttributeError(name)


def alone(linear: nn.Module) -> bool:
    """Whether `linear` is a quantized one that nothing is hooked into."""
    return isinstance(linear, QuantLinear) and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
