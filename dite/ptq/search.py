"""Share bits, groups and transforms out over the layers, within a budget.

    options      every layer quantized in every way that the recipe allows, on calibration moments      `build_options`
    fitness      a choice of one option a layer, put into the model and measured                         `Plans.error`
    dp           errors of single layers, measured end to end → knapsack → measured again inside the plan found → swaps
    evolution    the paper's, on the same options and fitness

What is measured goes into a journal; the layers that were measured are the layers that are deployed.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import nn

from dite.errors import UsageError
from dite.ptq.calibrate import Calls, observe
from dite.ptq.journal import Journal
from dite.ptq.rounding import Choices, portions, round_layer
from dite.quant.allocation import knapsack
from dite.quant.apply import Progress, replace_
from dite.quant.evolution import evolve
from dite.quant.linear import QuantLinear
from dite.quant.plan import LayerPlan, QuantPlan, weight_bytes
from dite.quant.scheme import LayerScheme
from dite.recipe import QuantRecipe, Search

Choice = tuple[int | None, ...]  # an option a slot; None is the layer as it was
ROUNDS = 2  # of measuring inside the plan found
SWAPS = 40
TIMED_RUNS = 7


@dataclass(frozen=True)
class Option:
    """One way to quantize one layer: the finished layer, its held-out output error, and what it costs in the budget's unit."""

    layer: QuantLinear
    rounding: str
    error: float
    cost: int


@dataclass
class Slot:
    """A place in a model where one of several options goes; `linear` is what was there."""

    model: nn.Module
    plan: LayerPlan
    linear: nn.Linear
    options: list[Option]


@dataclass
class Found:
    """What a search found and what it saw on the way: `evaluated` and `uniform` (cost, error) of whole plans, `frontier` as the knapsack predicts."""

    choice: tuple[int, ...]
    error: float
    cost: int
    forwards: int
    seconds: float
    frontier: list[tuple[int, float]] = field(default_factory=list)
    evaluated: list[tuple[int, float]] = field(default_factory=list)
    uniform: list[tuple[str, int, float]] = field(default_factory=list)


class OutOfForwards(Exception):
    """The next evaluation would exceed `search.max_forwards`."""


class Plans:
    """Puts choices into the models and measures them; remembers, in the journal, what it measured. Close it to get the models back as they were."""

    def __init__(self, slots: list[Slot], fine: Callable[[], float], coarse: Callable[[], float], journal: Journal | None, search: Search):
        self.slots, self.fine, self.coarse, self.journal, self.search = slots, fine, coarse, journal, search
        self.placed: list[int | None] = [None] * len(slots)
        self.seen: dict[str, float] = {}
        self.forwards = 0
        self.evaluated: list[tuple[int, float]] = []
        self.tick: Callable[[], None] = lambda: None

    def error(self, choice: Choice) -> float:
        """The joint error of a whole plan."""
        key = "fine " + _digest(choice)
        new = key not in self.seen
        error = self._measured(key, choice, self.fine)
        if new and None not in choice:
            self.evaluated.append((self.cost(choice), error))
        return error

    def coarse_error(self, choice: Choice) -> float:
        """The same on fewer samples; what single layers are measured with."""
        return self._measured("coarse " + _digest(choice), choice, self.coarse)

    def cost(self, choice: Choice) -> int:
        return sum(slot.options[option].cost for slot, option in zip(self.slots, choice, strict=True))

    def put(self, choice: Choice) -> None:
        """Make the models what `choice` says."""
        for index, (slot, option) in enumerate(zip(self.slots, choice, strict=True)):
            if option != self.placed[index]:
                layer = slot.linear if option is None else slot.options[option].layer
                replace_(slot.model, slot.plan.name, layer)
                before = self.placed[index]
                if before is not None:
                    slot.options[before].layer._prepared = None  # an expanded weight of every option would not fit memory
                self.placed[index] = option

    def _measured(self, key: str, choice: Choice, fitness: Callable[[], float]) -> float:
        if key in self.seen:
            return self.seen[key]
        # Counted whether or not the journal knows the answer: a resumed search must stop where an uninterrupted one does.
        if self.forwards + fitness.forwards > self.search.max_forwards:
            raise OutOfForwards
        self.forwards += fitness.forwards
        if self.journal is not None and key in self.journal.known:
            error = self.journal.known[key]
        else:
            self.put(choice)
            error = fitness()
            if self.journal is not None:
                self.journal.add(key, error)
        self.seen[key] = error
        self.tick()
        return error


def _digest(choice: Choice) -> str:
    return hashlib.sha256(repr(tuple(choice)).encode()).hexdigest()[:32]


@torch.no_grad()
def build_options(
    model: nn.Module, plan: QuantPlan, calls: Calls, recipe: QuantRecipe, journal: Journal | None = None, progress: Progress | None = None
) -> list[Slot]:
    """Quantize every planned layer of a full-precision `model` in every way the search may choose; the model stays as it is."""
    slots: list[Slot] = []
    timer = _Timer(journal) if recipe.search.budget_time_ms is not None else None
    for some in portions(plan.layers):
        inputs = observe(model, [layer.name for layer in some], calls)
        for layer in some:
            linear = model.get_submodule(layer.name)
            options = []
            for scheme, transform in layer_options(layer, recipe):
                choices = choices_of(recipe, transform)
                if layer.name in inputs:
                    found = round_layer(linear, scheme, layer.kind, inputs[layer.name], choices, layer.name)
                    built, rounding, error = found.layer, found.rounding, found.error or 0.0
                else:
                    built, rounding, error = QuantLinear.from_linear(linear, scheme, layer.name), "nearest", 0.0
                cost = weight_bytes(layer.in_features, layer.out_features, built.scheme)
                if timer is not None:
                    cost = timer.microseconds(built, inputs[layer.name].count // max(1, len(calls.calibration)) if layer.name in inputs else 1)
                options.append(Option(built, rounding, error, cost))
            inputs.pop(layer.name, None)  # its factorisations take as much memory as its moments
            slots.append(Slot(model, layer, linear, undominated(options)))
            if progress:
                progress(f"options: {layer.name}", len(slots), len(plan.layers))
    return slots


def choices_of(recipe: QuantRecipe, transform: str | None = None) -> Choices:
    """The recipe's choices, with another transform in a search."""
    return Choices(transform or recipe.transform, recipe.rounding, recipe.rank, recipe.gptq.ordered, recipe.gptq.shrink, recipe.effort)


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
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def limit(search: Search, slots: list[Slot], other_bytes: int) -> int:
    """What the options may cost together. Raises UsageError when the cheapest don't fit, with the numbers."""
    weights = sum(slot.plan.in_features * slot.plan.out_features for slot in slots)
    least = sum(min(option.cost for option in slot.options) for slot in slots)
    if search.budget_time_ms is not None:
        budget, shown, unit = int(search.budget_time_ms * 1000), lambda cost: f"{cost / 1000:.2f}", "ms a forward (quantized layers)"
    elif search.budget_bytes is not None:
        budget, shown, unit = (
            search.budget_bytes - other_bytes,
            lambda cost: f"{cost + other_bytes}",
            "bytes, of which " + (f"{other_bytes} are what is not quantized, in bf16"),
        )
    else:
        bits = search.budget_bits
        budget, shown, unit = int(bits * weights / 8), lambda cost: f"{8 * cost / weights:.3f}", "bits a quantized weight, scales included"
    if least > budget:
        given = search.budget_time_ms or search.budget_bytes or search.budget_bits
        raise UsageError(
            f"no plan fits a budget of {given}",
            f"the smallest that search.bits, group_sizes and transforms allow takes {shown(least)} {unit}",
            "raise the budget, or allow fewer bits or larger groups",
        )
    return budget


def search_plans(plans: Plans, budget: int, search: Search, progress: Progress | None = None) -> Found:
    """The best choice within `budget`, by the recipe's strategy."""
    started = time.monotonic()
    steps = [0]
    a_fine = plans.fine.forwards
    total = max(1, search.max_forwards // a_fine) if search.strategy == "evolution" else len(plans.slots) * (1 + ROUNDS) + SWAPS

    def tick() -> None:
        steps[0] += 1
        if progress:
            progress(f"search: {search.strategy}", min(steps[0], total), total)

    plans.tick = tick
    _check_forwards(plans, search)
    costs = [[option.cost for option in slot.options] for slot in plans.slots]
    uniform = uniform_choices(plans.slots)
    compared = [(name, plans.cost(choice), plans.error(choice)) for name, choice in uniform.items()]
    strategy = _dp if search.strategy == "dp" else _evolution
    choice, error, frontier = strategy(plans, costs, budget, search, uniform)
    return Found(choice, error, plans.cost(choice), plans.forwards, time.monotonic() - started, frontier, plans.evaluated, compared)


def _check_forwards(plans: Plans, search: Search) -> None:
    """Raise UsageError when `max_forwards` is not enough to choose at all."""
    least = (len(uniform_choices(plans.slots)) + 1) * plans.fine.forwards
    if search.strategy == "dp":
        least += len(plans.slots) * plans.coarse.forwards
    if least > search.max_forwards:
        rule = f"{search.strategy} needs {least} for {len(plans.slots)} layers, max_forwards is {search.max_forwards}"
        raise UsageError("this search may not run the model often enough", rule, f"set search.max_forwards to {2 * least} or more")


def uniform_choices(slots: list[Slot]) -> dict[str, tuple[int, ...]]:
    """One plan for each number of bits: every layer's cheapest option of so many bits, or the nearest it has."""
    found = {}
    for bits in sorted({option.layer.scheme.weight.num_bits for slot in slots for option in slot.options}):
        choice = []
        for slot in slots:
            ranked = sorted(range(len(slot.options)), key=lambda index: (abs(slot.options[index].layer.scheme.weight.num_bits - bits), index))
            choice.append(ranked[0])
        found[f"W{bits}"] = tuple(choice)
    return found


def _dp(plans: Plans, costs: list[list[int]], budget: int, search: Search, uniform: dict) -> tuple[tuple[int, ...], float, list]:
    slots, nothing = plans.slots, [None] * len(plans.slots)
    # One end-to-end measurement a layer, at its cheapest option; its other options scale with their own output errors.
    single = [plans.coarse_error((*nothing[:index], 0, *nothing[index + 1 :])) ** 2 for index in range(len(slots))]
    table = [_scaled(slot.options, 0, value) for slot, value in zip(slots, single, strict=True)]
    best = knapsack(costs, table, budget)
    frontier = best.frontier
    # All uniform plans have been measured; `_check_forwards` saw to it that one more can be.
    candidates = [tuple(best.choice), *(choice for choice in uniform.values() if plans.cost(choice) <= budget)]
    choice, error = min(((one, plans.error(one)) for one in candidates), key=lambda pair: pair[1])
    try:
        for _ in range(ROUNDS):
            # Again, inside the plan found: what a layer adds to the others' error, interaction included.
            whole = plans.coarse_error(choice) ** 2
            inside = [whole - plans.coarse_error((*choice[:index], None, *choice[index + 1 :])) ** 2 for index in range(len(slots))]
            floor = 0.01 * whole / len(slots)
            table = [_scaled(slot.options, choice[index], max(inside[index], floor)) for index, slot in enumerate(slots)]
            again = tuple(knapsack(costs, table, budget).choice)
            if again == choice:
                break
            found = plans.error(again)
            if found < error:
                choice, error = again, found
        choice, error = _swap(plans, costs, table, budget, choice, error)
    except OutOfForwards:
        pass
    return choice, error, frontier


def _scaled(options: list[Option], measured: int, value: float) -> list[float]:
    """Squared errors of all options from that of one, in proportion to their squared output errors."""
    reference = max(options[measured].error, 1e-12)
    return [value * (option.error / reference) ** 2 for option in options]


def _swap(plans: Plans, costs: list, table: list, budget: int, choice: tuple[int, ...], error: float) -> tuple[tuple[int, ...], float]:
    """Greedy: the most promising exchanges between two layers, each kept if the whole plan gets better by it."""
    for _ in range(SWAPS):
        moves = sorted(_moves(costs, table, budget - plans.cost(choice), choice))
        tried = {key for key in plans.seen if key.startswith("fine ")}
        move = next((new for _, new in moves if "fine " + _digest(new) not in tried), None)
        if move is None:
            break
        found = plans.error(move)
        if found < error:
            choice, error = move, found
    return choice, error


def _moves(costs: list, table: list, slack: int, choice: tuple[int, ...]):
    """(predicted change, new choice): one layer steps up, and if it must, another steps down to pay for it."""
    for up, option in enumerate(choice):
        if option + 1 >= len(costs[up]):
            continue
        price = costs[up][option + 1] - costs[up][option] - slack
        gain = table[up][option + 1] - table[up][option]
        raised = (*choice[:up], option + 1, *choice[up + 1 :])
        if price <= 0:
            yield gain, raised
            continue
        for down, lower in enumerate(choice):
            if down != up and lower > 0 and costs[down][lower] - costs[down][lower - 1] >= price:
                yield gain + table[down][lower - 1] - table[down][lower], (*raised[:down], lower - 1, *raised[down + 1 :])


def _evolution(plans: Plans, costs: list, budget: int, search: Search, uniform: dict) -> tuple[tuple[int, ...], float, list]:
    best: list[tuple[float, tuple[int, ...]]] = []

    def fitness(choice: tuple[int, ...]) -> float:
        error = plans.error(choice)
        best.append((error, choice))
        return error

    try:
        choice, error = evolve(costs, budget, fitness, list(uniform.values()), search.seed)
    except OutOfForwards:
        error, choice = min(best)
    return choice, error, []


def deployed(slots: list[Slot], found: Found) -> list[LayerPlan]:
    """The plans of the layers that `found` chose."""
    chosen = [slot.options[option] for slot, option in zip(slots, found.choice, strict=True)]
    return [
        replace(slot.plan, scheme=option.layer.scheme, rounding=option.rounding, error=option.error)
        for slot, option in zip(slots, chosen, strict=True)
    ]


class _Timer:
    """The measured table behind `budget_time_ms`: what each kind of layer takes here, on the backend that will run it."""

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
        x = torch.randn(max(1, rows), layer.in_features, device=layer.qdata.device)
        times = []
        for _ in range(TIMED_RUNS + 1):  # the first one prepares the weight
            begin = time.perf_counter()
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        layer._prepared = None
        return sorted(times[1:])[TIMED_RUNS // 2]
