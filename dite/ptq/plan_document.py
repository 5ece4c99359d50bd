"""`plan.json`: what a search found, what it saw on the way, and for which model."""

import hashlib
from typing import Any

from torch import nn

from dite.ptq.search import Found
from dite.quant.plan import LayerPlan, QuantPlan
from dite.quant.scheme import LayerScheme
from dite.recipe import QuantRecipe

FORMAT_VERSION = 1


def plan_document(found: dict[str, nn.Module], plans: dict[str, QuantPlan], recipe: QuantRecipe, result: Found, baseline: int) -> dict[str, Any]:
    """Everything that the report draws. Sizes are of the whole transformer(s) with what is not quantized in bf16, whatever the budget's unit."""
    layers = [(f"{name}." if len(found) > 1 else "", layer) for name in found for layer in plans[name].layers]
    other = sum(one.other_bytes for one in plans.values())
    frontier = [] if recipe.search.budget_time_ms is not None else result.frontier  # of a budget in time it has no bytes
    return {
        "format_version": FORMAT_VERSION,
        "model": {"class": "+".join(type(part).__name__ for part in found.values()), "linears": linears_digest(plans)},
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
        "search": {
            "strategy": recipe.search.strategy,
            "fitness": recipe.search.fitness,
            "budget": budget_of(recipe),
            "seed": recipe.search.seed,
            "forwards": result.forwards,
            "seconds": round(result.seconds, 2),
        },
        "bytes": sum(one.estimated_bytes for one in plans.values()),
        "baseline_bytes": baseline,
        "error": result.error,
        "uniform": [{"name": name, "bytes": cost + other, "error": error} for name, cost, error in result.uniform],
        "frontier": [{"bytes": cost + other, "error": error**0.5} for cost, error in frontier],
        "evaluated": [{"bytes": cost + other, "error": error} for cost, error in result.evaluated],
        "layers": [layer_facts(prefix, layer) for prefix, layer in layers],
        "skipped": {name: reason for one in plans.values() for name, reason in one.skipped.items()},
    }


def linears_digest(plans: dict[str, QuantPlan]) -> str:
    """SHA-256 of the names and shapes of the planned linears: which models a plan is for."""
    text = "\n".join(f"{part} {layer.name} {layer.in_features} {layer.out_features}" for part, plan in plans.items() for layer in plan.layers)
    return hashlib.sha256(text.encode()).hexdigest()


def budget_of(recipe: QuantRecipe) -> dict[str, Any]:
    """The one budget that is given, by kind and limit."""
    search = recipe.search
    kinds = {"bytes": search.budget_bytes, "bits": search.budget_bits, "time": search.budget_time_ms}
    return next(({"kind": kind, "limit": value} for kind, value in kinds.items() if value is not None), {})


def transform_name(scheme: LayerScheme) -> str:
    """As recipes spell it: none, hadamard, smooth+hadamard, lowrank, hadamard+lowrank…

    >>> transform_name(LayerScheme.model_validate({"weight": {}, "rank": 16}))
    'lowrank'
    """
    parts = [scheme.transform.kind] if scheme.transform.kind != "none" else []
    return "+".join(parts + (["lowrank"] if scheme.rank else [])) or "none"


def layer_facts(prefix: str, layer: LayerPlan) -> dict[str, Any]:
    """A quantized layer as `plan.json` and `dite quantize --json` tell it; `prefix` is its component's name where there are several."""
    scheme = layer.scheme
    return {
        "name": prefix + layer.name,
        "kind": layer.kind,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "weight_bits": scheme.weight.num_bits,
        "activation_bits": scheme.activation.num_bits if scheme.activation else None,
        "group_size": scheme.weight.group_size,
        "transform": transform_name(scheme),
        "rank": scheme.rank,
        "rounding": layer.rounding,
        "error": layer.error,
        "bytes": layer.weight_bytes,
    }
