"""LoRA adapters on quantized models, through PEFT's and diffusers' own doors.

PEFT puts its layer around a QuantLinear as around any other linear, because one has a `weight` to look at (see `standin`):

    y = quantized(x) + scale · B(A(x))        A, B in the adapter's dtype; removing the adapter leaves the very QuantLinear that was there

What is left to do here: refuse what would have to change codes before anything has changed, and tell adapters from the model's own layers.
"""

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from dite.errors import UnsupportedModel, UsageError
from dite.quant.apply import quantized_layers
from dite.quant.standin import WeightStandIn

UNLOAD = "save the adapters by themselves and unload them first (unload_lora_weights, or diffusers.utils.recurse_remove_peft_layers on the model)"


def prepare_for_adapters_(model: nn.Module) -> None:
    """Make a quantized diffusers model loadable by every `load_lora_weights`, and refuse `fuse_lora` as a whole."""
    if hasattr(model, "fuse_lora"):
        model.fuse_lora = refuse_fusing
        model._register_state_dict_hook(_answer_for_weights)


def refuse_fusing(*_args: Any, **_options: Any) -> None:
    """Instead of a quantized model's `fuse_lora`, which fails half way: linears that are not quantized would be fused by then."""
    raise UnsupportedModel(
        "a quantized linear holds integer codes, which no adapter can be added to",
        "use the adapter unfused (set_adapters sets its weight), or fuse it into the full-precision model and quantize that",
        what="an adapter can't be fused into a quantized model",
    )


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that PEFT has put itself around, with or without an adapter in use."""
    # No object of PEFT's can be there unless PEFT was imported, which takes seconds.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return [] if tuners is None else [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]


def refuse_adapters(model: nn.Module, can_not: str, hint: str) -> None:
    """Raise UsageError for a model with adapters attached: `can_not` says what can't be done, `hint` what to do first."""
    found = adapted_layers(model)
    if found:
        why = f"PEFT sits around {len(found)} of its layers, beginning with {found[0]}"
        raise UsageError(f"this {type(model).__name__} has adapters attached and can't be {can_not}", why, hint)


class QuantStateDict(OrderedDict):
    """A state dict that also answers for `LAYER.weight` of quantized linears, without listing or storing it: diffusers' FLUX loader looks them up."""

    layers: Mapping[str, nn.Module] = {}

    def __missing__(self, key: str) -> WeightStandIn:
        name = key.removesuffix(".weight")
        layer = self.layers.get(name) or self.layers.get(f"{name}.base_layer")
        if layer is None or name == key:
            raise KeyError(key)
        return layer.weight

    def __reduce__(self):
        return OrderedDict, (), vars(self).get("_metadata") and {"_metadata": self._metadata}, None, iter(self.items())


def _answer_for_weights(model: nn.Module, state: OrderedDict, prefix: str, _metadata: Any) -> QuantStateDict | None:
    if prefix:  # the dict belongs to a module around this one
        return None
    answering = QuantStateDict(state)
    answering._metadata, answering.layers = state._metadata, quantized_layers(model)
    return answering
