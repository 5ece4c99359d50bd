"""Put a plan into a model: each linear becomes a QuantLinear, one after the other, so that memory never holds more than one layer twice."""

import sys
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dite.errors import CheckpointError, QuantizationError, UnsupportedModel
from dite.quant.linear import QuantLinear
from dite.quant.plan import QuantPlan
from dite.quant.scheme import LayerScheme

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def quantize_linears_(model: nn.Module, plan: QuantPlan, progress: Progress | None = None) -> dict[str, float]:
    """Round every planned linear of `model` to nearest, in place; returns each weight's relative error ‖W − Ŵ‖ / ‖W‖.

    `progress(what, done, total)` is called after each layer. Raises QuantizationError at a layer that can't be quantized, those before it done:
    call `check_weights` first.
    """
    errors = {}
    for index, layer in enumerate(plan.layers):
        linear = model.get_submodule(layer.name)
        quantized = QuantLinear.from_linear(linear, layer.scheme, layer.name)
        errors[layer.name] = _relative_error(linear.weight, quantized)
        replace_(model, layer.name, quantized)
        if progress:
            progress(f"layers: {layer.name}", index + 1, len(plan.layers))
    return errors


def check_weights(model: nn.Module, plan: QuantPlan) -> None:
    """Raise QuantizationError, which names the layer, if a weight is not finite, planned or not, or has a dtype that nothing is computed in;
    UnsupportedModel if one isn't in memory."""
    for layer in plan.layers:
        linear = model.get_submodule(layer.name)
        if linear.weight.is_meta:
            raise UnsupportedModel(f"the weight of {layer.name} is not in memory (meta device)", "load the model without offloading first")
        if not quantizable_dtype(linear.weight):
            why = f"its weight is {linear.weight.dtype}; it must be a real floating-point number of at least 16 bits"
            raise QuantizationError(f"layer {layer.name} can't be quantized", why, "load the model in bfloat16 (dtype=torch.bfloat16)")
        QuantLinear.check_weight(linear, layer.name)
    for name, tensor in model.named_parameters():  # biases, norms, embedders: they would spoil the calibration, and the model is spoilt anyway
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        tensor = tensor.detach() if quantizable_dtype(tensor) else tensor.detach().float()  # there is no minimum of float8
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise QuantizationError(f"{name} is not finite", f"{bad} of its {tensor.numel()} numbers are NaN or inf", "repair the checkpoint")


def quantizable_dtype(weight: torch.Tensor) -> bool:
    """Whether codes can be made of a weight: float8 and complex numbers have no minimum and maximum in torch."""
    return weight.is_floating_point() and weight.element_size() >= 2


def insert_empty_layers_(model: nn.Module, layers: Mapping[str, LayerScheme], device: torch.device | str = "meta") -> None:
    """Replace linears by quantized ones without contents, for a loader to fill."""
    for name, scheme in layers.items():
        linear = model.get_submodule(name)
        if scheme.rank > min(linear.in_features, linear.out_features):
            rule = f"rank {scheme.rank} is more than a {linear.out_features}×{linear.in_features} layer can have"
            raise CheckpointError(f"the scheme of {name} can't be", rule, "was the folder made for another model?")
        dtype = linear.weight.dtype
        replace_(model, name, QuantLinear(linear.in_features, linear.out_features, scheme, linear.bias is not None, device=device, dtype=dtype))


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a model's state dict, tied ones once."""
    held = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Every quantized linear of `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
def dequantize_linears_(model: nn.Module) -> None:
    """Put a plain linear, with the weights that its codes stand for in the layer's dtype, in the place of every quantized one."""
    for name, layer in quantized_layers(model).items():
        bias, like = layer.bias, layer.weight
        linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias is not None, device=like.device, dtype=like.dtype)
        linear.weight.copy_(layer.dequantize(like.dtype))
        if bias is not None:
            linear.bias.copy_(bias)
        replace_(model, name, linear.train(layer.training))
    if "diffusers" in sys.modules:
        from dite.quant.fused import unfuse_

        for module in model.modules():
            unfuse_(module)


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` was, and wherever else that one is used: a module may have several names."""
    old = model.get_submodule(name)
    names = [other for other, one in model.named_modules(remove_duplicate=False) if one is old]
    for parent, _, child in (other.rpartition(".") for other in names):
        setattr(model.get_submodule(parent), child, module)
    if isinstance(module, QuantLinear) and "diffusers" in sys.modules:
        from dite.quant.fused import fuse_  # imports diffusers: only where it is there already

        for parent in {other.rpartition(".")[0] for other in names}:
            while parent:
                fuse_(model.get_submodule(parent))
                parent = parent.rpartition(".")[0]


def _relative_error(weight: torch.Tensor, layer: QuantLinear) -> float:
    """‖W − Ŵ‖ / ‖W‖ in fp32, a few rows at a time: it must not double the memory of a large layer."""
    squared_error = squared_norm = 0.0
    restored = layer.dequantize(weight.dtype)
    for rows, approximate in zip(weight.split(256), restored.split(256), strict=True):
        squared_error += float((rows.float() - approximate.float()).square().sum())
        squared_norm += float(rows.float().square().sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
