"""Share a budget out over layers: the multiple-choice knapsack, solved by dynamic programming.

    minimise Σ_l error[l][o_l]      subject to      Σ_l cost[l][o_l] ≤ budget,      one option o_l a layer

Costs are rounded up to whole units of budget / RESOLUTION, so that a solution never exceeds the budget; at most one unit a layer is wasted. Budgets
of at most RESOLUTION are solved exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESOLUTION = 20_000


class Infeasible(ValueError):
    """Not even the cheapest options fit; `least` is what they cost."""

    def __init__(self, least: int, budget: int):
        super().__init__(f"the cheapest choice costs {least}, the budget is {budget}")
        self.least = least


@dataclass(frozen=True)
class Allocation:
    """`choice[l]` is the option of layer l; `error` and `cost` are the sums; `frontier` the (cost, error) of the best choices of every size."""

    choice: list[int]
    error: float
    cost: int
    frontier: list[tuple[int, float]]


def knapsack(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> Allocation:
    """The cheapest-error choice within `budget`. Raises Infeasible when there is none."""
    least = sum(min(row) for row in costs)
    if least > budget:
        raise Infeasible(least, budget)
    # What the cheapest choice costs is spent anyway: only what exceeds it is shared out, so rounding hurts that alone.
    slack = budget - least
    unit = max(1, -(-slack // RESOLUTION))
    extras = [[-(-(cost - min(row)) // unit) for cost in row] for row in costs]
    size = slack // unit
    best = torch.zeros(size + 1, dtype=torch.float64)  # the least error with so much room
    taken: list[list[int]] = []
    for extra, error in zip(extras, errors, strict=True):
        totals = torch.full((len(extra), size + 1), math.inf, dtype=torch.float64)
        for option, (weight, value) in enumerate(zip(extra, error, strict=True)):
            if weight <= size:
                totals[option, weight:] = best[: size + 1 - weight] + value
        best, choice = totals.min(0)
        taken.append(choice.tolist())
    choice = _trace(taken, extras, size)
    return Allocation(choice, _sum(errors, choice), _sum(costs, choice), _frontier(taken, extras, costs, errors, best.tolist()))


def _trace(taken: list[list[int]], extras: list[list[int]], room: int) -> list[int]:
    choice = []
    for options, extra in zip(reversed(taken), reversed(extras), strict=True):
        choice.append(options[room])
        room -= extra[options[room]]
    return choice[::-1]


def _frontier(taken, extras, costs, errors, best: list[float], points: int = 60) -> list[tuple[int, float]]:
    """Sizes at which the best error falls, about `points` of them."""
    falls = [room for room in range(len(best)) if room == 0 or best[room] < best[room - 1]]
    step = max(1, len(falls) // points)
    rooms = sorted({*falls[::step], falls[-1]})
    chosen = [_trace(taken, extras, room) for room in rooms]
    return [(_sum(costs, choice), _sum(errors, choice)) for choice in chosen]


def _sum(table: Sequence[Sequence], choice: list[int]):
    return sum(row[option] for row, option in zip(table, choice, strict=True))
