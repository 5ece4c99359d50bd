"""Recipe + model → plan."""

from torch import nn

from dite.errors import UnsupportedModel, UsageError
from dite.models.discovery import OUTSIDE, Discovery, LinearInfo, discover, kind_by_structure
from dite.models.families import example_inputs
from dite.quant.apply import quantized_layers
from dite.quant.lora import refuse_adapters
from dite.quant.plan import LayerPlan, QuantPlan
from dite.recipe import QuantRecipe


def make_plan(model: nn.Module, recipe: QuantRecipe, discovery: Discovery | None = None, *, allow_marked: bool = False) -> QuantPlan:
    """What `recipe` does to each linear of `model`.

    Raises UsageError when the model is quantized already or has adapters attached, UnsupportedModel when nothing is left to quantize.
    """
    refuse_quantized(model, allow_marked)
    refuse_adapters(model, "quantized", "fuse them (fuse_lora) and unload them first, or unload them now and load them again on the quantized model")
    discovery = discovery or discover(model, example_inputs(model))
    layers, skipped, linears = [], dict(discovery.outside), list(discovery.linears)
    for name, reason in discovery.outside.items():
        if reason == OUTSIDE and recipe.names(name):
            module = model.get_submodule(name)
            linears.append(LinearInfo(name, kind_by_structure(model, name), module.in_features, module.out_features))
            del skipped[name]
    for linear in linears:
        scheme = recipe.scheme(linear.name, linear.kind)
        if isinstance(scheme, str):
            skipped[linear.name] = scheme
        else:
            layers.append(LayerPlan(linear.name, linear.kind, linear.in_features, linear.out_features, scheme))
    if not layers:
        inside = [reason for reason in skipped.values() if reason != OUTSIDE]
        most = f": {max(inside, key=inside.count)}" if inside else ""
        hint = "give at least one kind of linear a weight scheme, or take off what keeps linears from being quantized"
        raise UnsupportedModel(f"recipe {recipe.name} leaves all {len(skipped)} linears alone{most}", hint)
    planned = sum(layer.in_features * layer.out_features for layer in layers)
    unmatched = recipe.unmatched([*(linear.name for linear in linears), *skipped])
    return QuantPlan(layers, skipped, baseline_bytes(model) - 2 * planned, discovery.basis, unmatched)


def baseline_bytes(model: nn.Module) -> int:
    """What the model's weights take on disk in bf16."""
    return 2 * sum(tensor.numel() for tensor in model.state_dict().values())


def refuse_quantized(model: nn.Module, allow_marked: bool = False) -> None:
    """Raise UsageError for a model that some quantizer, ours or another, has been at.

    `allow_marked`: diffusers marks a model as quantized before a quantizer that works while loading has begun.
    """
    ours = quantized_layers(model)
    if ours or (getattr(model, "is_quantized", False) and not allow_marked):
        by = "dite" if ours else str(getattr(getattr(model, "quantization_method", None), "value", "another quantizer"))
        raise UsageError(
            f"this {type(model).__name__} is quantized already (by {by})",
            "rounding codes again only adds error",
            "start from the full-precision model",
        )
