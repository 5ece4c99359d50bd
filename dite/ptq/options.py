"""The options of a search: every layer quantized in every way that the recipe allows, what each costs, and whether a budget can be met at all."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn

from dite.errors import UsageError
from dite.ptq.calibrate import Calls, LayerInputs, observe
from dite.ptq.journal import Journal
from dite.ptq.rounding import Choices, Rounded, choices_of, needed, portions, round_layer
from dite.quant.apply import Progress
from dite.quant.linear import QuantLinear
from dite.quant.plan import LayerPlan, QuantPlan, weight_bytes
from dite.quant.scheme import LayerScheme
from dite.recipe import QuantRecipe, Search

TIMED_RUNS = 7


@dataclass(frozen=True)
class Option:
    """One way to quantize one layer: the finished layer, its held-out output error (None: not measured), its bytes, and its cost in the budget's
    unit."""

    layer: QuantLinear
    rounding: str
    error: float | None
    bytes: int
    cost: int


@dataclass
class Slot:
    """A place in a model where one of several options goes; `linear` is what was there."""

    model: nn.Module
    plan: LayerPlan
    linear: nn.Linear
    options: list[Option]


@torch.no_grad()
def build_options(
    model: nn.Module, plan: QuantPlan, calls: Calls, recipe: QuantRecipe, journal: Journal | None = None, progress: Progress | None = None
) -> tuple[list[Slot], list[str]]:
    """Quantize every planned layer of a full-precision `model` in every way the search may choose; the model stays as it is.

    Also returns the names of layers that saw too little. One that saw nothing has nothing to choose by: it is rounded as the recipe says.
    """
    slots: list[Slot] = []
    short: list[str] = []
    timer = _Timer(journal) if recipe.search.budget_time_ms is not None else None
    for some in portions(plan.layers):
        inputs = observe(model, [layer.name for layer in some], calls)
        for layer in some:
            linear = model.get_submodule(layer.name)
            seen = inputs.pop(layer.name, None)  # taken out: its moments and their factorisations are large
            seen = seen if seen is not None and seen.rows else None
            if seen is None or seen.count < needed(layer):
                short.append(layer.name)
            ways = [(layer.scheme, "none")] if seen is None else layer_options(layer, recipe)
            options = [_option(linear, layer, scheme, choices_of(recipe, layer, transform), seen) for scheme, transform in ways]
            if timer is not None:
                rows = 1 if seen is None else seen.count // len(calls.calibration)
                options = [replace(option, cost=timer.microseconds(option.layer, rows)) for option in options]
            # The paper's search draws from everything; ours leaves out what can't be part of a best plan.
            slots.append(Slot(model, layer, linear, undominated(options) if recipe.search.strategy == "dp" else options))
            if progress:
                progress(f"options: {layer.name}", len(slots), len(plan.layers))
    return slots, short


def _option(linear: nn.Linear, layer: LayerPlan, scheme: LayerScheme, choices: Choices, seen: LayerInputs | None) -> Option:
    if seen is None:
        found = Rounded(QuantLinear.from_linear(linear, scheme, layer.name), "nearest", None)
    else:
        found = round_layer(linear, scheme, seen, choices, layer.name)
    size = stored_bytes(found.layer)
    return Option(found.layer, found.rounding, found.error, size, size)


def stored_bytes(layer: QuantLinear) -> int:
    """Bytes on disk of what stands for the weight, at 16 bits a smooth scale and low-rank factor. Scales may be wider than planned: tiny ones are."""
    codes = [tensor.numel() * tensor.element_size() for tensor in (layer.qdata, layer.scale, layer.zero_point) if tensor is not None]
    return sum(codes) + sum(2 * tensor.numel() for tensor in (layer.smooth, layer.lowrank_down, layer.lowrank_up) if tensor is not None)


def layer_options(layer: LayerPlan, recipe: QuantRecipe) -> list[tuple[LayerScheme, str]]:
    """Schemes and transforms to try; a layer whose bits or groups a pattern of the recipe fixes keeps them."""
    search = recipe.search
    given = recipe.transform_of(layer.name)
    transforms = [given] if given else search.transforms if layer.kind == "token" else ["none"]
    if recipe.names(layer.name):
        return [(layer.scheme, transform) for transform in transforms]
    groups = list(dict.fromkeys(size if size is None or size < layer.in_features else None for size in search.group_sizes))
    schemes = []
    for bits, size, transform in product(search.bits, groups, transforms):
        weight = layer.scheme.weight.model_copy(update={"num_bits": bits, "group_size": size})
        schemes.append((layer.scheme.model_copy(update={"weight": weight}), transform))
    return schemes


def undominated(options: list[Option]) -> list[Option]:
    """Without those that another beats in both held-out error and cost; cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, math.inf if option.error is None else option.error)):
        if not kept or (option.error is not None and option.error < kept[-1].error):
            kept.append(option)
    return kept


def limit(recipe: QuantRecipe, slots: list[Slot], other_bytes: int) -> int:
    """What the options may cost together. Raises UsageError when the cheapest don't fit, with the numbers."""
    weights = sum(slot.plan.in_features * slot.plan.out_features for slot in slots)
    return _fitting(recipe.search, sum(min(option.cost for option in slot.options) for slot in slots), weights, other_bytes)


def check_budget(recipe: QuantRecipe, plans: Mapping[str, QuantPlan], a_trial: int) -> None:
    """Raise UsageError, before anything has run, for a budget in bytes or bits that no plan fits, and for too few forwards to measure every layer."""
    layers = [layer for plan in plans.values() for layer in plan.layers]
    if recipe.search.budget_time_ms is None:
        sizes = [min(weight_bytes(layer.in_features, layer.out_features, scheme) for scheme, _ in layer_options(layer, recipe)) for layer in layers]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        _fitting(recipe.search, sum(sizes), weights, sum(plan.other_bytes for plan in plans.values()))
    least = len(layers) * a_trial
    if recipe.search.strategy == "dp" and least > recipe.search.max_forwards:
        refuse_forwards(recipe.search, least, len(layers))


def _fitting(search: Search, least: int, weights: int, other_bytes: int) -> int:
    if search.budget_time_ms is not None:
        budget, shown, unit = int(search.budget_time_ms * 1000), f"{least / 1000:.2f}", "ms for the quantized layers in one calibration batch"
    elif search.budget_bytes is not None:
        budget, shown = search.budget_bytes - other_bytes, f"{least + other_bytes}"
        unit = f"bytes, of which {other_bytes} are what is not quantized, in bf16"
    else:
        budget, shown, unit = int(search.budget_bits * weights / 8), f"{8 * least / weights:.3f}", "bits a quantized weight, scales included"
    if least > budget:
        given = search.budget_time_ms or search.budget_bytes or search.budget_bits
        why = f"the smallest that search.bits, group_sizes and transforms allow takes {shown} {unit}"
        raise UsageError(f"no plan fits a budget of {given}", why, "raise the budget, or allow fewer bits or larger groups")
    return budget


def refuse_forwards(search: Search, least: int, layers: int) -> None:
    rule = f"{search.strategy} needs {least} for {layers} layers, max_forwards is {search.max_forwards}"
    raise UsageError("this search may not run the model often enough", rule, f"set search.max_forwards to {2 * least} or more")


class _Timer:
    """The measured table behind `budget_time_ms`: what each kind of layer takes here for the rows of one calibration batch, in float32."""

    def __init__(self, journal: Journal | None):
        self.journal = journal
        self.known: dict[str, float] = dict(journal.known) if journal is not None else {}

    def microseconds(self, layer: QuantLinear, rows: int) -> int:
        key = f"time {layer.in_features} {layer.out_features} {rows} {layer.scheme.model_dump_json()}"
        if key not in self.known:
            self.known[key] = max(1, round(1e6 * self._median(layer, rows)))
            if self.journal is not None:
                self.journal.add(key, self.known[key])
        return int(self.known[key])

    def _median(self, layer: QuantLinear, rows: int) -> float:
        x = torch.randn(max(1, rows), layer.in_features, device=layer.scale.device)
        times = []
        for _ in range(TIMED_RUNS + 1):  # the first one prepares the weight
            begin = time.perf_counter()
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        layer.unprepare()
        return sorted(times[1:])[TIMED_RUNS // 2]
