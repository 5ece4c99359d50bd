"""Quantize one linear: try the ways that a recipe allows, keep the one whose outputs on held-out inputs are nearest to the original's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from dite.ptq.calibrate import Calls, LayerInputs, observe
from dite.quant.apply import Progress, replace_
from dite.quant.gptq import SingularHessian, gptq
from dite.quant.linear import QuantLinear
from dite.quant.plan import LayerPlan, QuantPlan
from dite.quant.scheme import LayerScheme, TransformScheme
from dite_kernels import dense
from dite_kernels.hadamard import rotate, signs
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight

HADAMARD = TransformScheme(kind="hadamard", block=128, sign_seed=0)
NONE = TransformScheme()
MOMENT_BYTES = 1_500_000_000  # of second moments held at a time


@dataclass(frozen=True)
class Rounded:
    """A quantized layer, how its codes were chosen (`nearest` or `gptq`), and its relative output error on held-out inputs; None: not measured."""

    layer: QuantLinear
    rounding: str
    error: float | None


@torch.no_grad()
def round_layer(
    linear: nn.Linear, scheme: LayerScheme, kind: str, inputs: LayerInputs, transform: str, rounding: str, name: str = "layer"
) -> Rounded:
    """The best of what `transform` (none, hadamard, auto) and `rounding` (nearest, gptq, auto) allow.

    Only token linears are rotated: conditioning linears keep their activations in floats, and gain nothing from it.
    """
    rows = torch.cat(inputs.rows) if inputs.rows else None
    best: Rounded | None = None
    for basis, method in _candidates(kind, transform, rounding):
        try:
            layer = _rounded(linear, scheme.model_copy(update={"transform": basis}), inputs.moments, method, name)
        except SingularHessian:
            continue
        found = Rounded(layer, method, None if rows is None else output_error(linear, layer, rows))
        if best is None or _finite(found.error) < _finite(best.error):
            best = found
    return best or Rounded(_rounded(linear, scheme, inputs.moments, "nearest", name), "nearest", None)


def output_error(linear: nn.Linear, layer: QuantLinear, rows: torch.Tensor) -> float:
    """‖y − ŷ‖ / ‖y‖ over `rows` [M, K], biases left out: activations are quantized as they will be, whatever backend will run the layer."""
    wanted = rows @ linear.weight.detach().float().T
    error = dense.linear(layer.rotated(rows), layer.tensor.dequantize(layer.spec), None, layer.spec) - wanted
    norm = wanted.norm()
    return float(error.norm() / norm) if norm > 0 else float(error.norm())


def _finite(error: float | None) -> float:
    return error if error is not None and math.isfinite(error) else math.inf


def _candidates(kind: str, transform: str, rounding: str) -> Iterator[tuple[TransformScheme, str]]:
    bases = {"none": [NONE], "hadamard": [HADAMARD], "auto": [NONE, HADAMARD]}[transform if kind == "token" else "none"]
    methods = {"nearest": ["nearest"], "gptq": ["gptq"], "auto": ["nearest", "gptq"]}[rounding]
    return ((basis, method) for basis in bases for method in methods)


def _rounded(linear: nn.Linear, scheme: LayerScheme, moments: torch.Tensor, method: str, name: str) -> QuantLinear:
    def by_gptq(weight: torch.Tensor, spec: LinearSpec) -> QuantTensor:
        return gptq(weight, _rotated(moments, scheme.transform), spec, ordered=True, shrink=True)

    return QuantLinear.from_linear(linear, scheme, name, by_gptq if method == "gptq" else quantize_weight)


def _rotated(moments: torch.Tensor, transform: TransformScheme) -> torch.Tensor:
    """The moments [K, K] of rotated inputs."""
    if not transform.rotates:
        return moments
    sign = None if transform.sign_seed is None else signs(len(moments), transform.sign_seed)
    return rotate(rotate(moments, transform.block, sign).T, transform.block, sign)


def round_linears_(model: nn.Module, plan: QuantPlan, calls: Calls, transform: str, rounding: str, progress: Progress | None = None) -> QuantPlan:
    """Replace every planned linear by its best quantized form; returns the plan as it was carried out, with each layer's transform.

    Layers are observed a few at a time, so that their moments take at most MOMENT_BYTES; later ones are calibrated on what the quantized ones
    before them put out.
    """
    done: list[LayerPlan] = []
    for some in _chunks(plan.layers):
        inputs = observe(model, [layer.name for layer in some], calls)
        for layer in some:
            linear = model.get_submodule(layer.name)
            scheme = layer.scheme
            if layer.name in inputs:
                found = round_layer(linear, scheme, layer.kind, inputs[layer.name], transform, rounding, layer.name)
            else:  # a layer that the model's forward never called
                found = Rounded(QuantLinear.from_linear(linear, scheme, layer.name), "nearest", None)
            replace_(model, layer.name, found.layer)
            done.append(replace(layer, scheme=found.layer.scheme, rounding=found.rounding, error=found.error))
            if progress:
                progress(layer.name, len(done), len(plan.layers))
    return replace(plan, layers=done)


def _chunks(layers: list[LayerPlan]) -> Iterator[list[LayerPlan]]:
    some: list[LayerPlan] = []
    size = 0
    for layer in layers:
        cost = 4 * layer.in_features**2
        if some and size + cost > MOMENT_BYTES:
            yield some
            some, size = [], 0
        some.append(layer)
        size += cost
    yield some
