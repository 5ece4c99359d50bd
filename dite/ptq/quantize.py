"""The `quantize` verb: recipe in, quantized model in place, report out."""

import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dite.checkpoint.diffusers_quantizer import mark_quantized_
from dite.errors import UsageError
from dite.models.access import denoisers, unwrap
from dite.models.discovery import discover
from dite.models.planning import baseline_bytes, make_plan
from dite.ptq.calibrate import Calls, record
from dite.ptq.rounding import round_linears_
from dite.quant.apply import Progress, check_weights, quantize_linears_
from dite.quant.plan import QuantPlan
from dite.recipe import QuantRecipe, load_recipe
from dite.sampling import class_ids, takes_classes


@dataclass(frozen=True)
class QuantReport:
    """What was done, layer by layer.

    `bytes` and `baseline_bytes` are the transformer's weights on disk, the baseline counted in bf16; `bf16_bytes` is what `bytes` would be if the
    layers left alone were bf16 too. `basis` says how token and conditioning linears
    were told apart; `unmatched_patterns` are those of the recipe's `layers` that name nothing in this model.
    """

    recipe: QuantRecipe
    layers: list[dict[str, Any]]
    skipped: dict[str, str]
    baseline_bytes: int
    bytes: int
    seconds: float
    peak_memory_bytes: int
    basis: str = "observed"
    unmatched_patterns: tuple[str, ...] = ()
    bf16_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The keys of `dite quantize --json`."""
        values = {key: getattr(self, key) for key in ("layers", "skipped", "baseline_bytes", "bytes", "seconds", "peak_memory_bytes", "basis")}
        values["bf16_bytes"] = self.bf16_bytes
        values["unmatched_patterns"] = list(self.unmatched_patterns)
        return {"recipe": self.recipe.model_dump(mode="json", exclude_unset=True)} | values

    def __str__(self) -> str:
        ratio = self.baseline_bytes / self.bytes
        sizes = f"{self.baseline_bytes / 1e6:.1f} MB → {self.bytes / 1e6:.1f} MB ({ratio:.2f}× smaller)"
        wide = f"; {self.bf16_bytes / 1e6:.1f} MB with the layers left alone in bf16" if self.wide else ""
        return f"{self.recipe.name}: {len(self.layers)} layers, {sizes} in {self.seconds:.1f} s{wide}"

    @property
    def wide(self) -> bool:
        """Whether the layers left alone take notably more than they would in bf16."""
        return self.bf16_bytes is not None and self.bytes > 1.02 * self.bf16_bytes


def quantize(
    model: Any,
    recipe: str | Path | dict | QuantRecipe = "w4a8",
    *,
    overrides: list[str] | None = None,
    example_inputs: dict | None = None,
    progress: Progress | None = None,
) -> QuantReport:
    """Quantize the transformer(s) of a pipeline, or a bare model, in place.

    `recipe` is a name, a YAML file, a dict or a QuantRecipe; `overrides` are `a.b=c` strings. `example_inputs` (keyword arguments of the model's
    forward) tell token from conditioning linears in a model dite doesn't know. `progress(layer, done, total)` is called after each layer.

    A recipe that calibrates (`rounding` or `transform` other than nearest and none) samples with the pipeline first, so it needs a whole one.

    Raises RecipeError, UsageError (quantized already; nothing to sample with), UnsupportedModel (no transformer blocks), QuantizationError (NaN in
    weights: nothing has changed; NaN met in calibration: load the model again).
    """
    started = time.monotonic()
    recipe = load_recipe(recipe, overrides)
    found = denoisers(model)
    plans = {name: _plan_one(part, recipe, example_inputs) for name, part in found.items()}
    for name, part in found.items():
        check_weights(part, plans[name])
    baseline = sum(baseline_bytes(part) for part in found.values())
    layers, skipped = [], {}
    calls = _calls(model, found, recipe, progress) if recipe.calibrated else {}
    for name, part in found.items():
        if recipe.calibrated:
            plans[name] = round_linears_(part, plans[name], calls[name], recipe.transform, recipe.rounding, progress)
        else:
            errors = quantize_linears_(part, plans[name], progress)
            plans[name] = replace(plans[name], layers=[replace(layer, error=errors[layer.name]) for layer in plans[name].layers])
        mark_quantized_(part, plans[name], recipe)
        prefix = _prefix(name, found)
        layers += [_row(prefix, layer, recipe.calibrated) for layer in plans[name].layers]
        skipped |= {prefix + layer: reason for layer, reason in plans[name].skipped.items()}
    size = sum(tensor.numel() * tensor.element_size() for part in found.values() for tensor in part.state_dict().values())
    narrow = sum(one.estimated_bytes for one in plans.values())
    first, *others = plans.values()
    unmatched = tuple(pattern for pattern in first.unmatched if all(pattern in other.unmatched for other in others))
    return QuantReport(recipe, layers, skipped, baseline, size, time.monotonic() - started, peak_memory_bytes(), first.basis, unmatched, narrow)


def plan(model: Any, recipe: str | Path | dict | QuantRecipe, example_inputs: dict | None = None) -> QuantPlan:
    """What `quantize` would do, without doing it; names of a second transformer's layers carry its component's name."""
    found = denoisers(model)
    plans = {_prefix(name, found): _plan_one(part, load_recipe(recipe), example_inputs) for name, part in found.items()}
    first = next(iter(plans.values()))
    return QuantPlan(
        [replace(layer, name=prefix + layer.name) for prefix, one in plans.items() for layer in one.layers],
        {prefix + name: reason for prefix, one in plans.items() for name, reason in one.skipped.items()},
        sum(one.other_bytes for one in plans.values()),
        first.basis,
        first.unmatched,
    )


def peak_memory_bytes() -> int:
    """The largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plan_one(model, recipe: QuantRecipe, given: dict | None) -> QuantPlan:
    # Planned before anything is changed: a refusal must leave every component as it was.
    return make_plan(model, recipe, discover(model, given, strict=True) if given else None)


def _calls(model: Any, found: dict[str, Any], recipe: QuantRecipe, progress: Progress | None) -> dict[str, Calls]:
    """What each denoiser sees on the recipe's trajectories. Raises UsageError where there is nothing to sample with."""
    pipe, settings = unwrap(model), recipe.calibration
    what = f"recipe {recipe.name} calibrates (rounding: {recipe.rounding}, transform: {recipe.transform})"
    if not hasattr(pipe, "components"):
        raise UsageError(what, "a bare model has no sampler to run it with", "pass the whole pipeline, or use rounding: nearest and transform: none")
    conditions = class_ids(pipe) if takes_classes(pipe) else settings.prompts
    if not conditions:
        raise UsageError(what, f"{type(pipe).__name__} draws from prompts, and the recipe has none", "add calibration.prompts to the recipe")
    return record(pipe, found, spread(conditions, settings.num_samples), settings, progress)


def spread(conditions: list, count: int) -> list:
    """`count` of `conditions`: in turn, or evenly spaced where there are more.

    >>> spread([0, 1], 3), spread(list(range(1000)), 4)
    ([0, 1, 0], [0, 250, 500, 750])
    """
    return [conditions[index * len(conditions) // count if len(conditions) > count else index % len(conditions)] for index in range(count)]


def _row(prefix: str, layer, calibrated: bool) -> dict[str, Any]:
    scheme = layer.scheme
    return {
        "name": prefix + layer.name,
        "kind": layer.kind,
        "weight_bits": scheme.weight.num_bits,
        "activation_bits": scheme.activation.num_bits if scheme.activation else None,
        "group_size": scheme.weight.group_size,
        "transform": scheme.transform.kind,
        "rounding": layer.rounding,
        "error": layer.error,
        "error_of": "outputs" if calibrated else "weights",
    }


def _prefix(name: str, found: dict) -> str:
    return f"{name}." if len(found) > 1 else ""
