"""Carry out a recipe that calibrates: sample, then choose for each layer, or search for all of them together."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dite import __version__
from dite.models.access import unwrap
from dite.models.planning import baseline_bytes
from dite.ptq.calibrate import Calls, record
from dite.ptq.fitness import Fid, Trajectories
from dite.ptq.journal import Journal
from dite.ptq.plan_document import plan_document
from dite.ptq.rounding import round_linears_
from dite.ptq.search import Found, Plans, build_options, choices_of, deployed, limit, search_plans
from dite.quant.apply import Progress
from dite.quant.plan import QuantPlan
from dite.recipe import QuantRecipe
from dite.sampling import class_ids, takes_classes

COARSE, FINE, SHORT_STEPS = 4, 8, 8  # trajectories of single layers and of whole plans, and their steps
Models = dict[str, torch.nn.Module]
QuantPlans = dict[str, QuantPlan]


def calibrated_(
    model: Any, found: Models, plans: QuantPlans, recipe: QuantRecipe, journal: str | Path | None, progress: Progress | None
) -> tuple[QuantPlans, dict[str, Any] | None, list[str]]:
    """Quantize the models `found` in a pipeline; returns their plans as carried out, the document of a search, and notes.

    Interrupted or failing, a search leaves the models as they were.
    """
    notes: list[str] = []
    document = None
    # Rounding to bf16 moves a trajectory about as much as one layer's quantization does: a search compares in float32.
    precise = _in_float32(unwrap(model)) if recipe.search.active else nullcontext()
    with Journal(Path(journal), _header(found, plans, recipe)) if journal is not None else nullcontext() as opened, precise:
        calls = _calls(model, found, recipe, opened, progress)
        if recipe.search.active:
            baseline = sum(baseline_bytes(part) for part in found.values())
            plans, result = _search(model, found, plans, calls, recipe, opened, progress)
            document = plan_document(found, plans, recipe, result, baseline)
        else:
            plans = dict(plans)
            for name, part in found.items():
                given = {layer.name: transform for layer in plans[name].layers if (transform := recipe.transform_of(layer.name))}
                plans[name], short = round_linears_(part, plans[name], calls[name], choices_of(recipe), given, progress)
                notes += _short_notes(short)
    return plans, document, notes


def _conditions(model: Any, recipe: QuantRecipe) -> list[Any]:
    pipe = unwrap(model)
    return class_ids(pipe) if takes_classes(pipe) else recipe.calibration.prompts


def _calls(model: Any, found: dict[str, Any], recipe: QuantRecipe, journal: Journal | None, progress: Progress | None) -> dict[str, Calls]:
    """What each denoiser sees on the recipe's trajectories; from the journal if an interrupted run recorded it."""
    calls = journal.calls() if journal is not None else None
    if calls is None:
        settings = recipe.calibration
        calls = record(unwrap(model), found, spread(_conditions(model, recipe), settings.num_samples), settings, progress)
        if journal is not None:
            journal.keep_calls(calls)
    return calls


def _search(
    model, found, plans, calls, recipe: QuantRecipe, journal: Journal | None, progress: Progress | None
) -> tuple[dict[str, QuantPlan], Found]:
    """Search and put what was found into the models; raises before they change, or leaves them as they were."""
    pipe, search = unwrap(model), recipe.search
    conditions = _conditions(model, recipe)
    slots = [slot for name, part in found.items() for slot in build_options(part, plans[name], calls[name], recipe, journal, progress)]
    budget = limit(search, slots, sum(one.other_bytes for one in plans.values()))
    guidance, seed = recipe.calibration.guidance, search.seed
    coarse = Trajectories(pipe, conditions, COARSE, SHORT_STEPS, guidance, seed)
    fine = Trajectories(pipe, conditions, FINE, SHORT_STEPS, guidance, seed) if search.fitness == "surrogate" else _fid(pipe, search)
    measured = Plans(slots, fine, coarse, journal, search)
    try:
        result = search_plans(measured, budget, search, progress)
    except BaseException:
        measured.put([None] * len(slots))
        raise
    measured.put(result.choice)
    chosen = deployed(slots, result)
    for name in found:
        count = len(plans[name].layers)
        plans[name], chosen = replace(plans[name], layers=chosen[:count]), chosen[count:]
    return plans, result


def _fid(pipe: Any, search) -> Fid:
    from dite.evaluation import evaluate

    def measure(n: int) -> float:
        return evaluate(pipe, search.fid_protocol, n=n, dtype="float32")["fid"]

    steps = evaluate(pipe, search.fid_protocol, n=search.fid_samples, dtype="float32", dry_run=True)["protocol"]["steps"]
    return Fid(measure, search.fid_samples, 2 * steps * search.fid_samples)


@contextmanager
def _in_float32(pipe: Any) -> Iterator[None]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    before = [next((tensor.dtype for tensor in part.parameters()), torch.float32) for part in parts]
    narrow = [(part, dtype) for part, dtype in zip(parts, before, strict=True) if dtype != torch.float32]
    for part, _ in narrow:
        torch.nn.Module.to(part, torch.float32)  # diffusers' own `to` warns of exactly what is wanted here
    try:
        yield
    finally:
        for part, dtype in narrow:
            torch.nn.Module.to(part, dtype)


def _header(found: dict[str, Any], plans: dict[str, QuantPlan], recipe: QuantRecipe) -> dict[str, Any]:
    """What a journal belongs to. Weights count by a sample of each: reading all of a large model takes as long as some searches."""
    weights = hashlib.sha256()
    for name, part in found.items():
        for layer in plans[name].layers:
            weights.update(f"{name} {layer.name} {layer.in_features} {layer.out_features}".encode())
            weights.update(part.get_submodule(layer.name).weight.detach()[:1].float().cpu().numpy().tobytes())
    recipe_digest = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()
    return {"dite_version": __version__, "model": weights.hexdigest(), "recipe": recipe_digest}


def _short_notes(short: list[str]) -> list[str]:
    if not short:
        return []
    names = ", ".join(short[:3]) + (" …" if len(short) > 3 else "")
    why = "4 rows a feature (1 for conditioning layers); rounding was kept where held-out errors said so"
    return [f"{len(short)} layers saw fewer calibration rows than GPTQ should have ({why}): {names}; raise calibration.num_calls or num_samples"]


def spread(conditions: list, count: int) -> list:
    """`count` of `conditions`: in turn, or evenly spaced where there are more.

    >>> spread([0, 1], 3), spread(list(range(1000)), 4)
    ([0, 1, 0], [0, 250, 500, 750])
    """
    return [conditions[index * len(conditions) // count if len(conditions) > count else index % len(conditions)] for index in range(count)]
