"""Carry out a recipe that calibrates: sample, then choose for each layer, or search for all of them together."""

import hashlib
import os
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
from dite.ptq.options import build_options, check_budget, limit
from dite.ptq.plan_document import plan_document
from dite.ptq.rounding import round_linears_
from dite.ptq.search import Found, Plans, deployed, search_plans
from dite.quant.apply import Progress
from dite.quant.linear import QuantLinear
from dite.quant.plan import QuantPlan
from dite.recipe import QuantRecipe
from dite.sampling import class_ids, takes_classes
from dite_kernels import backends

HALF = (torch.bfloat16, torch.float16)
COARSE, FINE, SHORT_STEPS = 4, 8, 8  # trajectories of single layers and of whole plans, and their steps
Models = dict[str, torch.nn.Module]
QuantPlans = dict[str, QuantPlan]


def calibrated_(
    model: Any, found: Models, plans: QuantPlans, recipe: QuantRecipe, journal: str | Path | None, progress: Progress | None
) -> tuple[QuantPlans, dict[str, Any] | None, list[str]]:
    """Quantize the models `found` in a pipeline; returns their plans as carried out, the document of a search, and notes.

    Interrupted or failing, a search leaves the models as they were. `journal` is where either keeps what it has done.
    """
    notes: list[str] = []
    document = None
    # Rounding to bf16 moves a trajectory about as much as one layer's quantization does: a search compares in float32.
    precise = _in_float32(unwrap(model)) if recipe.search.active else nullcontext()
    if recipe.search.active:
        check_budget(recipe, plans, COARSE * SHORT_STEPS * 2)
    with Journal(Path(journal), _header(model, recipe)) if journal is not None else nullcontext() as opened, precise:
        calls = _calls(model, found, recipe, opened, progress)
        if recipe.search.active:
            baseline = sum(baseline_bytes(part) for part in found.values())
            plans, result, notes = _search(model, found, plans, calls, recipe, opened, progress)
            document = plan_document(found, plans, recipe, result, baseline)
        else:
            plans = dict(plans)
            for name, part in found.items():
                plans[name], short = round_linears_(part, plans[name], calls[name], recipe, progress, opened, f"{name}.")
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
    model: Any, found: Models, plans: QuantPlans, calls: dict[str, Calls], recipe: QuantRecipe, journal: Journal | None, progress: Progress | None
) -> tuple[QuantPlans, Found, list[str]]:
    """Search and put what was found into the models; whatever is raised, they are as they were."""
    pipe, search = unwrap(model), recipe.search
    slots, notes = [], []
    for name, part in found.items():
        built, short = build_options(part, plans[name], calls[name], recipe, journal, progress)
        slots += built
        notes += _short_notes(short)
    budget = limit(recipe, slots, sum(one.other_bytes for one in plans.values()))
    conditions, guidance, seed = _conditions(model, recipe), recipe.calibration.guidance, search.seed
    coarse, fine = (Trajectories(pipe, spread(conditions, count), SHORT_STEPS, guidance, seed) for count in (COARSE, FINE))
    measured = Plans(slots, fine if search.fitness == "surrogate" else _fid(pipe, search), coarse, journal, search, budget)
    try:
        result = search_plans(measured, progress)
    except BaseException:
        measured.put([None] * len(slots))
        raise
    measured.put(result.choice)
    chosen, carried_out = deployed(slots, result), {}
    for name in found:
        count = len(plans[name].layers)
        carried_out[name], chosen = replace(plans[name], layers=chosen[:count]), chosen[count:]
    return carried_out, result, notes


def _fid(pipe: Any, search) -> Fid:
    from dite.evaluation import evaluate

    how = {"protocol": search.fid_protocol, "n": search.fid_samples, "dtype": "float32"}
    steps = evaluate(pipe, **how, dry_run=True)["protocol"]["steps"]
    return Fid(lambda: evaluate(pipe, **how)["fid"], 2 * steps * search.fid_samples)


@contextmanager
def _in_float32(pipe: Any) -> Iterator[None]:
    """Half-precision tensors as float32 for a while; then every one that is still there as it was, and layers put in its place likewise."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    before = [{name: tensor.dtype for name, tensor in (*part.named_parameters(), *part.named_buffers()) if tensor.dtype in HALF} for part in parts]
    try:
        for part in parts:
            part._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
        yield
    finally:
        for part, dtypes in zip(parts, before, strict=True):
            for name, module in part.named_modules():
                prefix = f"{name}." if name else ""
                if isinstance(module, QuantLinear) and f"{prefix}weight" in dtypes:
                    module.to(dtypes[f"{prefix}weight"])
                else:
                    _cast_own_(module, {key: dtypes.get(prefix + key) for key in (*module._parameters, *module._buffers)})


def _cast_own_(module: torch.nn.Module, dtypes: dict[str, torch.dtype | None]) -> None:
    for key, dtype in dtypes.items():
        if dtype is not None and module._parameters.get(key) is not None:
            module._parameters[key].data = module._parameters[key].data.to(dtype)
        elif dtype is not None and module._buffers.get(key) is not None:
            module._buffers[key] = module._buffers[key].to(dtype)


def _header(model: Any, recipe: QuantRecipe) -> dict[str, Any]:
    """What a journal belongs to: everything that decides what its numbers are, to the last bit."""
    from dite.models.digest import model_digest

    pipe = unwrap(model)
    return {
        "dite_version": __version__,
        "model": model_digest(pipe),
        "recipe": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(pipe.device),
        "backend": f"{os.environ.get('DITE_BACKEND', 'auto')} {backends.BACKENDS['cpu'].unavailable() or backends.BACKENDS['cpu'].describe()}",
    }


def _short_notes(short: list[str]) -> list[str]:
    if not short:
        return []
    names = ", ".join(short[:3]) + (" …" if len(short) > 3 else "")
    why = "4 rows a feature, 1 for conditioning layers; none at all: rounded to nearest"
    return [f"{len(short)} layers saw fewer calibration rows than GPTQ should have ({why}): {names}; raise calibration.num_calls or num_samples"]


def spread(conditions: list, count: int) -> list:
    """`count` of `conditions`: in turn, or evenly spaced where there are more.

    >>> spread([0, 1], 3), spread(list(range(1000)), 4)
    ([0, 1, 0], [0, 250, 500, 750])
    """
    return [conditions[index * len(conditions) // count if len(conditions) > count else index % len(conditions)] for index in range(count)]
