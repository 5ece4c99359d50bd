"""The `quantize` verb: recipe in, quantized model in place, report out."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dite.checkpoint.diffusers_quantizer import mark_quantized_
from dite.errors import UsageError
from dite.models.access import denoisers, unwrap
from dite.models.discovery import discover
from dite.models.planning import baseline_bytes, make_plan
from dite.ptq.calibrated import calibrated_
from dite.ptq.memory import explained_memory, peak_memory_bytes
from dite.ptq.plan_document import layer_facts, linears_digest
from dite.ptq.text_encoders import plan_text_encoders, quantize_text_encoders_
from dite.quant.apply import Progress, check_weights, quantize_linears_, state_bytes
from dite.quant.plan import QuantPlan
from dite.recipe import QuantRecipe, load_recipe
from dite.sampling import takes_classes


@dataclass(frozen=True)
class QuantReport:
    """What was done, layer by layer.

    `bytes` and `baseline_bytes` are the transformer's weights on disk, the baseline counted in bf16; `bf16_bytes` is what `bytes` would be if the
    layers left alone were bf16 too. `basis` says how token and conditioning linears
    were told apart; `unmatched_patterns` are those of the recipe's `layers` that name nothing in this model; `notes` what was not done as asked;
    `plan` what a search found, and what `plan.json` holds; `text_encoders` holds `{layers, baseline_bytes, bytes}` of each one that was quantized.
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
    notes: tuple[str, ...] = ()
    plan: dict[str, Any] | None = field(default=None, repr=False)
    text_encoders: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The keys of `dite quantize --json`."""
        values = {key: getattr(self, key) for key in ("layers", "skipped", "baseline_bytes", "bytes", "seconds", "peak_memory_bytes", "basis")}
        values |= {
            "text_encoders": self.text_encoders,
            "bf16_bytes": self.bf16_bytes,
            "unmatched_patterns": list(self.unmatched_patterns),
            "notes": list(self.notes),
        }
        values["search"] = self.plan and {key: self.plan[key] for key in ("search", "error", "uniform")}
        return {"recipe": self.recipe.model_dump(mode="json", exclude_unset=True)} | values

    def __str__(self) -> str:
        ratio = self.baseline_bytes / self.bytes
        sizes = f"{self.baseline_bytes / 1e6:.1f} MB → {self.bytes / 1e6:.1f} MB ({ratio:.2f}× smaller)"
        wide = f"; {self.bf16_bytes / 1e6:.1f} MB with the layers left alone in bf16" if self.wide else ""
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return f"{self.recipe.name}: {len(self.layers)} layers, {sizes} in {self.seconds:.1f} s{wide}{notes}"

    @property
    def wide(self) -> bool:
        """Whether the layers left alone take notably more than they would in bf16."""
        return self.bf16_bytes is not None and self.bytes > 1.02 * self.bf16_bytes


def quantize(
    model: Any,
    recipe: str | Path | dict | QuantRecipe = "w4a8",
    *,
    effort: str | None = None,
    overrides: list[str] | None = None,
    example_inputs: dict | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> QuantReport:
    """Quantize the transformer(s) of a pipeline, or a bare model, in place.

    `recipe` is a name, a YAML file, a dict or a QuantRecipe; `effort` (fast, default, high) and `overrides` (`a.b=c` strings) change it.
    `example_inputs` (keyword arguments of the model's forward) tell token from conditioning linears in a model dite doesn't know.
    `progress(what, done, total)` is called as the work goes on. `journal` is a folder in which calibration and search write down what they
    have done; given again after an interruption, they go on from there.

    A recipe that calibrates or searches samples with the pipeline first. Where there is nothing to sample with (a bare model, a text model and no
    calibration.prompts), one that leaves its choices to `auto` rounds to nearest instead, and the report's notes say so; others are refused.

    Raises RecipeError, UsageError (quantized already; nothing to sample with; no plan fits the budget), UnsupportedModel (no transformer blocks),
    QuantizationError (NaN in weights: nothing has changed; NaN met in calibration, memory ran out: load the model again),
    ResumeConflict (another run's journal).
    """
    started = time.monotonic()
    recipe = load_recipe(recipe, [*(overrides or []), *([f"effort={effort}"] if effort else [])])
    found = denoisers(model)
    plans = {name: _plan_one(part, recipe, example_inputs) for name, part in found.items()}
    if recipe.linears is not None and len(found) > 1:
        raise UsageError("this plan can't be repeated", "the pipeline has two transformers; plans are repeated on one", "search again (--search dp)")
    if recipe.linears not in (None, linears_digest(plans)):
        why = "the names and shapes of its linears are not this model's"
        raise UsageError("this plan was found for another model", why, "search again for this model (--search dp), or use a recipe")
    for name, part in found.items():
        check_weights(part, plans[name])
    encoders = plan_text_encoders(model, recipe.text_encoders) if recipe.text_encoders is not None else []
    baseline = sum(baseline_bytes(part) for part in found.values())
    used, notes = _settle(recipe, model)
    document = None
    with explained_memory(journaled=journal is not None and used.calibrated):
        if used.calibrated:
            plans, document, more = calibrated_(model, found, plans, used, journal, progress)
            notes += more
        else:
            for name, part in found.items():
                errors = quantize_linears_(part, plans[name], progress)
                plans[name] = replace(plans[name], layers=[replace(layer, error=errors[layer.name]) for layer in plans[name].layers])
    for name, part in found.items():
        mark_quantized_(part, plans[name], recipe, document and {"plan": document})
    encoded = quantize_text_encoders_(encoders, progress)
    layers, skipped, error_of = [], {}, "outputs" if used.calibrated else "weights"
    for name in found:
        prefix = _prefix(name, found)
        layers += [layer_facts(prefix, layer) | {"error_of": error_of} for layer in plans[name].layers]
        skipped |= {prefix + layer: reason for layer, reason in plans[name].skipped.items()}
    size = sum(map(state_bytes, found.values()))
    narrow = sum(one.estimated_bytes for one in plans.values())
    first, *others = plans.values()
    unmatched = tuple(pattern for pattern in first.unmatched if all(pattern in other.unmatched for other in others))
    seconds = time.monotonic() - started
    peak = peak_memory_bytes()
    return QuantReport(recipe, layers, skipped, baseline, size, seconds, peak, first.basis, unmatched, narrow, tuple(notes), document, encoded)


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


def _plan_one(model, recipe: QuantRecipe, given: dict | None) -> QuantPlan:
    # Planned before anything is changed: a refusal must leave every component as it was.
    return make_plan(model, recipe, discover(model, given, strict=True) if given else None)


def _settle(recipe: QuantRecipe, model: Any) -> tuple[QuantRecipe, list[str]]:
    """The recipe as it can be carried out here, with a note where that is less than it says. Raises UsageError where less won't do."""
    missing = None if not recipe.calibrated else _nothing_to_sample_with(model, recipe)
    if missing is None:
        return recipe, []
    why, hint = missing
    if recipe.lenient:
        return recipe.uncalibrated(), [f"rounded to nearest, not calibrated: {why}; {hint}"]
    what = f"recipe {recipe.name} calibrates (rounding: {recipe.rounding}, transform: {recipe.transform}, search: {recipe.search.strategy})"
    raise UsageError(what, why, f"{hint}, or use rounding: nearest, transform: none and search: {{strategy: none}}")


def _nothing_to_sample_with(model: Any, recipe: QuantRecipe) -> tuple[str, str] | None:
    pipe = unwrap(model)
    if not hasattr(pipe, "components"):
        return "a bare model has no sampler to run it with", "pass the whole pipeline"
    if not (takes_classes(pipe) or recipe.calibration.prompts):
        return f"{type(pipe).__name__} draws from prompts, and the recipe has none", "add calibration.prompts to the recipe"
    return None


def _prefix(name: str, found: dict) -> str:
    return f"{name}." if len(found) > 1 else ""
