"""Share bits, groups and transforms out over the layers, within a budget.

    options      every layer quantized in every way that the recipe allows                              `options.build_options`
    fitness      a choice of one option a layer, put into the model and measured                         `Plans.error`
    dp           errors of single layers, measured end to end → knapsack → measured again inside the plan found → swaps
    evolution    the paper's, on the same options and fitness

What is measured goes into a journal; the layers that were measured are the layers that are deployed.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dite.errors import QuantizationError
from dite.ptq.journal import Journal
from dite.ptq.options import Option, Slot, refuse_forwards
from dite.quant.allocation import knapsack
from dite.quant.apply import Progress, replace_
from dite.quant.evolution import evolve
from dite.quant.plan import LayerPlan
from dite.recipe import Search

Choice = tuple[int | None, ...]  # an option a slot; None is the layer as it was
ROUNDS = 2  # of measuring inside the plan found
SWAPS = 40
UNIFORM_GROUP = 128


@dataclass
class Found:
    """What a search found and what it saw on the way: `evaluated` and `uniform` (bytes, error) of whole plans, `frontier` (cost, error) as the
    knapsack predicts."""

    choice: tuple[int, ...]
    error: float
    forwards: int
    seconds: float
    frontier: list[tuple[int, float]] = field(default_factory=list)
    evaluated: list[tuple[int, float]] = field(default_factory=list)
    uniform: list[tuple[str, int, float]] = field(default_factory=list)


class OutOfForwards(Exception):
    """The next evaluation would exceed `search.max_forwards`; `Plans.best` holds the best so far."""


class Plans:
    """Puts choices into the models and measures them; remembers what it measured, also in the journal, and the best that fits `budget`."""

    def __init__(self, slots: list[Slot], fine: Any, coarse: Any, journal: Journal | None, search: Search, budget: int):
        self.slots, self.fine, self.coarse, self.journal, self.search, self.budget = slots, fine, coarse, journal, search, budget
        self.costs = [[option.cost for option in slot.options] for slot in slots]
        self.best: tuple[float, tuple[int, ...]] | None = None
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
        if new and math.isfinite(error):
            self.evaluated.append((sum(slot.options[option].bytes for slot, option in zip(self.slots, choice, strict=True)), error))
        if self.cost(choice) <= self.budget and (self.best is None or error < self.best[0]):
            self.best = (error, tuple(choice))
        return error

    def coarse_error(self, choice: Choice) -> float:
        """The same on fewer samples; what single layers are measured with."""
        return self._measured("coarse " + _digest(choice), choice, self.coarse)

    def cost(self, choice: Choice) -> int:
        return sum(row[option] for row, option in zip(self.costs, choice, strict=True))

    def affords(self, forwards: int) -> bool:
        """Whether so many more forwards may be spent."""
        return self.forwards + forwards <= self.search.max_forwards

    def put(self, choice: Choice) -> None:
        """Make the models what `choice` says."""
        for index, (slot, option) in enumerate(zip(self.slots, choice, strict=True)):
            if option != self.placed[index]:
                layer = slot.linear if option is None else slot.options[option].layer
                replace_(slot.model, slot.plan.name, layer)
                before = self.placed[index]
                if before is not None:
                    slot.options[before].layer.unprepare()  # an expanded weight of every option would not fit memory
                self.placed[index] = option

    def _measured(self, key: str, choice: Choice, fitness: Callable[[], float]) -> float:
        if key in self.seen:
            return self.seen[key]
        # Counted whether or not the journal knows the answer: a resumed search must stop where an uninterrupted one does.
        if not self.affords(fitness.forwards):
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


def search_plans(plans: Plans, progress: Progress | None = None) -> Found:
    """The best choice within the budget, by the recipe's strategy."""
    started, search = time.monotonic(), plans.search
    steps = [0]
    total = search.max_forwards // plans.fine.forwards if search.strategy == "evolution" else len(plans.slots) * (1 + ROUNDS) + SWAPS

    def tick() -> None:
        steps[0] += 1
        if progress:
            progress(f"search: {search.strategy}", min(steps[0], total), max(1, total))

    plans.tick = tick
    uniform = uniform_choices(plans.slots)
    _check_forwards(plans, len(uniform))
    compared = []
    for name, choice in uniform.items():
        error = plans.error(choice)
        compared.append((name, sum(slot.options[option].bytes for slot, option in zip(plans.slots, choice, strict=True)), error))
    frontier = []
    try:
        if search.strategy == "dp":
            frontier = _dp(plans, list(uniform.values()))
        else:
            evolve(plans.costs, plans.budget, plans.error, list(uniform.values()), search.seed)
    except OutOfForwards:
        pass
    if plans.best is None or not math.isfinite(plans.best[0]):
        raise QuantizationError("no plan within the budget gives finite latents", "every one that was measured failed", "allow more bits")
    error, choice = plans.best
    return Found(choice, error, plans.forwards, time.monotonic() - started, frontier, plans.evaluated, compared)


def _check_forwards(plans: Plans, uniform: int) -> None:
    """Raise UsageError when `max_forwards` is not enough to choose at all."""
    least = (uniform + 1) * plans.fine.forwards + len(plans.slots) * plans.coarse.forwards * (plans.search.strategy == "dp")
    if least > plans.search.max_forwards:
        refuse_forwards(plans.search, least, len(plans.slots))


def uniform_choices(slots: list[Slot]) -> dict[str, tuple[int, ...]]:
    """One plan for each number of bits, in groups of 128 where there are: of every layer's options the nearest to that, first of equals."""
    found = {}
    for bits in sorted({option.layer.scheme.weight.num_bits for slot in slots for option in slot.options}):
        choice = []
        for slot in slots:
            weights = [option.layer.scheme.weight for option in slot.options]
            apart = [(abs(weight.num_bits - bits), abs((weight.group_size or slot.plan.in_features) - UNIFORM_GROUP)) for weight in weights]
            choice.append(apart.index(min(apart)))
        found[f"W{bits}"] = tuple(choice)
    return found


def _dp(plans: Plans, uniform: list[tuple[int, ...]]) -> list[tuple[int, float]]:
    """Leaves what it finds in `plans.best`; returns the frontier that single layers predict."""
    slots, nothing = plans.slots, [None] * len(plans.slots)
    # One end-to-end measurement a layer, at its cheapest option; its other options scale with their own output errors.
    single = [plans.coarse_error((*nothing[:index], 0, *nothing[index + 1 :])) ** 2 for index in range(len(slots))]
    table = [_scaled(slot.options, 0, value) for slot, value in zip(slots, single, strict=True)]
    first = knapsack(plans.costs, table, plans.budget)
    plans.error(tuple(first.choice))
    try:
        for _ in range(ROUNDS):
            if not plans.affords((len(slots) + 1) * plans.coarse.forwards + plans.fine.forwards):
                break
            # Again, inside the plan found: what a layer adds to the others' error, interaction included.
            choice = plans.best[1]
            whole = plans.coarse_error(choice) ** 2
            inside = [whole - plans.coarse_error((*choice[:index], None, *choice[index + 1 :])) ** 2 for index in range(len(slots))]
            floor = 0.01 * whole / len(slots)
            table = [_scaled(slot.options, choice[index], max(inside[index], floor)) for index, slot in enumerate(slots)]
            again = tuple(knapsack(plans.costs, table, plans.budget).choice)
            if again == choice:
                break
            plans.error(again)
        _swap(plans, table)
    except OutOfForwards:
        pass
    return first.frontier


def _scaled(options: list[Option], measured: int, value: float) -> list[float]:
    """Squared errors of all options from that of one, in proportion to their squared output errors."""
    if len(options) == 1:
        return [value]
    reference = max(options[measured].error, 1e-12)
    return [value * (option.error / reference) ** 2 for option in options]


def _swap(plans: Plans, table: list) -> None:
    """Greedy: the most promising exchanges between two layers, each made if the whole plan gets better by it."""
    for _ in range(SWAPS):
        choice = plans.best[1]
        for _, up, down in sorted(_moves(plans.costs, table, plans.budget - plans.cost(choice), choice)):
            move = tuple(option + (index == up) - (index == down) for index, option in enumerate(choice))
            if "fine " + _digest(move) not in plans.seen:
                plans.error(move)
                break
        else:
            return


def _moves(costs: list, table: list, slack: int, choice: tuple[int, ...]) -> Iterator[tuple[float, int, int]]:
    """(predicted change, layer that steps up, layer that must step down to pay for it, or -1)."""
    for up, option in enumerate(choice):
        if option + 1 >= len(costs[up]):
            continue
        price = costs[up][option + 1] - costs[up][option] - slack
        gain = table[up][option + 1] - table[up][option]
        if price <= 0:
            yield gain, up, -1
            continue
        for down, lower in enumerate(choice):
            if down != up and lower > 0 and costs[down][lower] - costs[down][lower - 1] >= price:
                yield gain + table[down][lower - 1] - table[down][lower], up, down


def deployed(slots: list[Slot], found: Found) -> list[LayerPlan]:
    """The plans of the layers that `found` chose."""
    chosen = [slot.options[option] for slot, option in zip(slots, found.choice, strict=True)]
    return [
        replace(slot.plan, scheme=option.layer.scheme, rounding=option.rounding, error=option.error, stored_bytes=option.bytes)
        for slot, option in zip(slots, chosen, strict=True)
    ]
