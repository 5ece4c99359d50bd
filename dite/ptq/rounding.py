"""Quantize one linear: try the ways that a recipe allows, keep the one whose outputs on held-out inputs are nearest to the original's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from dite.ptq.calibrate import Calls, LayerInputs, observe
from dite.ptq.journal import Journal
from dite.quant.apply import Progress, replace_
from dite.quant.gptq import SingularHessian, curvature, gptq
from dite.quant.linear import QuantLinear
from dite.quant.plan import LayerPlan, QuantPlan
from dite.quant.scheme import LayerScheme, TransformScheme
from dite.quant.transforms import low_rank, smooth_scale
from dite.recipe import QuantRecipe
from dite_kernels import dense
from dite_kernels.hadamard import rotate, signs
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight

ROTATION = {"block": 128, "sign_seed": 0}
BASES = {
    "none": TransformScheme(),
    "hadamard": TransformScheme(kind="hadamard", **ROTATION),
    "smooth": TransformScheme(kind="smooth"),
    "smooth+hadamard": TransformScheme(kind="smooth+hadamard", **ROTATION),
}
AUTO = {"fast": ("none",), "default": ("none", "hadamard", "smooth+hadamard"), "high": ("none", "hadamard", "smooth", "smooth+hadamard")}
STRENGTHS = {"fast": (0.5,), "default": (0.5,), "high": (0.35, 0.5, 0.65)}
LOW_RANK = "lowrank"
MOMENT_BYTES = 1_500_000_000  # of second moments held at a time
ROUNDS = {"fast": 1, "default": 1, "high": 5}  # in how many portions layers are calibrated, each on what those before it put out
TOKENS_PER_FEATURE = 4  # below that, GPTQ was worse than rounding


@dataclass(frozen=True)
class Choices:
    """What may be tried on a layer: the recipe's `transform` (a name, or auto), `rank` of low-rank parts, `rounding`, GPTQ's variant, `effort`."""

    transform: str = "auto"
    rounding: str = "auto"
    rank: int = 16
    ordered: bool = True
    shrink: bool = False
    effort: str = "default"

    def trials(self) -> Iterator["Trial"]:
        """Everything to try, in order."""
        methods = {"nearest": ["nearest"], "gptq": ["gptq"], "auto": ["nearest", "gptq"]}[self.rounding]
        basis, _, _ = self.transform.removesuffix(LOW_RANK).rpartition("+")
        names = AUTO[self.effort] if self.transform == "auto" else [basis or "none"] if self.transform.endswith(LOW_RANK) else [self.transform]
        rank = self.rank if self.transform.endswith(LOW_RANK) else 0
        for name in names:
            for strength in STRENGTHS[self.effort] if name.startswith("smooth") else (None,):
                yield from (Trial(BASES[name], method, rank, strength) for method in methods)


def choices_of(recipe: QuantRecipe, layer: LayerPlan, transform: str | None = None) -> Choices:
    """What the recipe, or a search with its own `transform`, tries on a layer.

    Conditioning linears keep their activations in floats and gain nothing from a transform: they are changed only where a pattern says so.
    """
    usual = recipe.transform if layer.kind == "token" else "none"
    chosen = transform or recipe.transform_of(layer.name) or usual
    return Choices(chosen, recipe.rounding, recipe.rank, recipe.gptq.ordered, recipe.gptq.shrink, recipe.effort)


@dataclass(frozen=True)
class Trial:
    """One way to quantize a layer."""

    basis: TransformScheme
    rounding: str
    rank: int = 0
    strength: float | None = None


@dataclass(frozen=True)
class Rounded:
    """A quantized layer, how its codes were chosen (`nearest` or `gptq`), and its relative output error on held-out inputs; None: not measured."""

    layer: QuantLinear
    rounding: str
    error: float | None


@torch.no_grad()
def round_layer(linear: nn.Linear, scheme: LayerScheme, inputs: LayerInputs, choices: Choices, name: str = "layer") -> Rounded:
    """The best of what `choices` allow, its bias corrected where that helps."""
    rows = torch.cat(inputs.rows) if inputs.rows else None
    best: Rounded | None = None
    for trial in choices.trials():
        try:
            layer = _rounded(linear, scheme, inputs, trial, choices, name)
        except SingularHessian:
            continue
        found = Rounded(layer, trial.rounding, None if rows is None else output_error(linear, layer, rows))
        if best is None or _finite(found.error) < _finite(best.error):
            best = found
    if best is None:
        return Rounded(QuantLinear.from_linear(linear, scheme, name), "nearest", None)
    return best if rows is None else _with_corrected_bias(best, linear, inputs, rows)


def output_error(linear: nn.Linear, layer: QuantLinear, rows: torch.Tensor) -> float:
    """‖y − ŷ‖ / ‖y‖ over `rows` [M, K], biases left out: activations are quantized as they will be, whatever backend will run the layer."""
    return _relative(_errors(linear, layer, rows), rows @ linear.weight.detach().float().T)


def _errors(linear: nn.Linear, layer: QuantLinear, rows: torch.Tensor) -> torch.Tensor:
    """ŷ − y [M, N] without biases."""
    changed = layer.transformed(rows)
    found = dense.linear(changed, layer.tensor.dequantize(layer.spec), None, layer.spec)
    if layer.lowrank_up is not None:
        found += changed @ layer.lowrank_down.float().T @ layer.lowrank_up.float().T
    return found - rows @ linear.weight.detach().float().T


def _relative(errors: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = wanted.norm()
    return float(errors.norm() / norm) if norm > 0 else float(errors.norm())


def _with_corrected_bias(found: Rounded, linear: nn.Linear, inputs: LayerInputs, rows: torch.Tensor) -> Rounded:
    """Take what the weight's error does on average over the calibration rows off the bias, if there is one and held-out errors shrink by it."""
    layer = found.layer
    if layer.bias is None or not inputs.count or inputs.total is None or found.error is None:
        return found
    shift = (linear.weight.detach().float() - layer.dequantize()) @ (inputs.total / inputs.count)
    corrected = (linear.bias.detach().float() + shift).to(layer.bias.dtype)
    error = _relative(_errors(linear, layer, rows) + (corrected.float() - linear.bias.detach().float()), rows @ linear.weight.detach().float().T)
    if not error < found.error:
        return found
    layer.bias = corrected
    return replace(found, error=error)


def _finite(error: float | None) -> float:
    return error if error is not None and math.isfinite(error) else math.inf


def _rounded(linear: nn.Linear, scheme: LayerScheme, inputs: LayerInputs, trial: Trial, choices: Choices, name: str) -> QuantLinear:
    smooth = smooth_scale(inputs.peaks, linear.weight, trial.strength) if trial.basis.smooths else None

    def by_gptq(weight: torch.Tensor, spec: LinearSpec) -> QuantTensor:
        key = (trial.basis.kind, trial.strength, choices.ordered)
        if key not in inputs.curvatures:
            inputs.curvatures[key] = curvature(_transformed(inputs.moments, trial.basis, smooth), ordered=choices.ordered)
        return gptq(weight, inputs.curvatures[key], spec, ordered=choices.ordered, shrink=choices.shrink)

    def factor(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = (trial.basis.kind, trial.strength, rank)
        if key not in inputs.factors:
            inputs.factors[key] = low_rank(weight, _transformed(inputs.moments, trial.basis, smooth), rank)
        return inputs.factors[key]

    chosen = scheme.model_copy(update={"transform": trial.basis, "rank": min(trial.rank, linear.in_features, linear.out_features)})
    return QuantLinear.from_linear(linear, chosen, name, by_gptq if trial.rounding == "gptq" else quantize_weight, smooth, factor)


def _transformed(moments: torch.Tensor, basis: TransformScheme, smooth: torch.Tensor | None) -> torch.Tensor:
    """The moments [K, K] of smoothed and rotated inputs."""
    if smooth is not None:
        moments = moments * smooth * smooth[:, None]
    if not basis.rotates:
        return moments
    sign = None if basis.sign_seed is None else signs(len(moments), basis.sign_seed)
    return rotate(rotate(moments, basis.block, sign).T, basis.block, sign)


def round_linears_(
    model: nn.Module,
    plan: QuantPlan,
    calls: Calls,
    recipe: QuantRecipe,
    progress: Progress | None = None,
    journal: Journal | None = None,
    prefix: str = "",
) -> tuple[QuantPlan, list[str]]:
    """Replace every planned linear by its best quantized form; returns the plan as it was carried out, with each layer's transform, and the names of
    layers that saw too little.

    Layers are observed a few at a time, so that their moments take at most MOMENT_BYTES; later ones are calibrated on what the quantized ones
    before them put out. Layers are kept in `journal`, under `prefix` and their names, and taken from it if they are there.
    """
    done: list[LayerPlan] = []
    short: list[str] = []
    for some in portions(plan.layers, ROUNDS[recipe.effort]):
        kept = {layer.name: journal and _kept(journal, prefix, model, layer) for layer in some}
        missing = [name for name, found in kept.items() if found is None]
        inputs = observe(model, missing, calls) if missing else {}
        for layer in some:
            found, little = kept.pop(layer.name) or _observed(model, layer, inputs.pop(layer.name, None), recipe)
            if journal is not None and layer.name in missing:
                _keep(journal, prefix, layer, found, little)
            short += [layer.name] if little else []
            replace_(model, layer.name, found.layer)
            done.append(replace(layer, scheme=found.layer.scheme, rounding=found.rounding, error=found.error))
            if progress:
                progress(f"layers: {layer.name}", len(done), len(plan.layers))
    return replace(plan, layers=done), short


def _observed(model: nn.Module, layer: LayerPlan, inputs: LayerInputs | None, recipe: QuantRecipe) -> tuple[Rounded, bool]:
    """A layer quantized by what it was given, and whether that was less than it should be; None: the model's forward never called it."""
    linear = model.get_submodule(layer.name)
    if inputs is None:
        return Rounded(QuantLinear.from_linear(linear, layer.scheme, layer.name), "nearest", None), True
    return round_layer(linear, layer.scheme, inputs, choices_of(recipe, layer), layer.name), inputs.count < needed(layer)


def _keep(journal: Journal, prefix: str, layer: LayerPlan, found: Rounded, short: bool) -> None:
    facts = {"scheme": found.layer.scheme.model_dump(mode="json"), "rounding": found.rounding, "error": found.error, "short": short}
    journal.keep_layer(prefix + layer.name, found.layer.state_dict(), facts)


def _kept(journal: Journal, prefix: str, model: nn.Module, layer: LayerPlan) -> tuple[Rounded, bool] | None:
    """What `_keep` wrote."""
    read = journal.layer(prefix + layer.name)
    if read is None:
        return None
    tensors, facts = read
    linear, scheme = model.get_submodule(layer.name), LayerScheme.model_validate(facts["scheme"])
    shape = (linear.in_features, linear.out_features)
    found = QuantLinear(*shape, scheme, linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)
    found.load_state_dict(tensors)
    return Rounded(found.train(linear.training), facts["rounding"], facts["error"]), facts["short"]


def needed(layer: LayerPlan) -> int:
    """Calibration rows that GPTQ should have: 4 a feature; conditioning inputs, which vary with timestep and condition only, one."""
    return layer.in_features * (TOKENS_PER_FEATURE if layer.kind == "token" else 1)


def portions(layers: list[LayerPlan], rounds: int = 1) -> Iterator[list[LayerPlan]]:
    """Layers in at least `rounds` portions (if there are as many), whose moments take at most MOMENT_BYTES."""
    some: list[LayerPlan] = []
    most, size = -(-len(layers) // rounds), 0
    for layer in layers:
        cost = 4 * layer.in_features**2
        if some and (size + cost > MOMENT_BYTES or len(some) == most):
            yield some
            some, size = [], 0
        some.append(layer)
        size += cost
    yield some
