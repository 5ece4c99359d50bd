"""Evolutionary search over one option a layer, as Q-DiT does it (arXiv 2406.17343, section 3.3). Pure, no torch.

Each generation keeps the `parents` best choices ever seen and fills up with children, half by mutation (each layer draws anew with `mutation`
probability), half by uniform crossover of two parents. A child over the budget is repaired: random layers step down until it fits.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Choice = tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """The paper's: 50 choices a generation, 10 generations, the 10 best survive, every tenth layer mutates."""

    population: int = 50
    generations: int = 10
    parents: int = 10
    mutation: float = 0.1


def evolve(
    costs: Sequence[Sequence[int]],
    budget: int,
    fitness: Callable[[Choice], float],
    first: Sequence[Choice],
    seed: int = 0,
    settings: Settings | None = None,
) -> tuple[Choice, float]:
    """The fittest (smallest) choice within `budget` and its fitness; `first` are choices to start from, repaired if they don't fit.

    Deterministic for a seed. The cheapest choice must fit.
    """
    settings, draw = settings or Settings(), random.Random(seed)
    population = list(dict.fromkeys(repaired(choice, costs, budget, draw) for choice in first))[: settings.population]
    population += [_fresh(costs, budget, draw) for _ in range(settings.population - len(population))]
    seen: dict[Choice, float] = {}
    for generation in range(settings.generations):
        for choice in population:
            if choice not in seen:
                seen[choice] = fitness(choice)
        best = sorted(seen, key=lambda choice: (seen[choice], choice))[: settings.parents]
        if generation + 1 < settings.generations:
            population = [_child(best, costs, budget, draw, settings.mutation, crossed=index % 2 == 1) for index in range(settings.population)]
    return best[0], seen[best[0]]


def repaired(choice: Choice, costs: Sequence[Sequence[int]], budget: int, draw: random.Random) -> Choice:
    """`choice` with layers stepped down, in random order, to their next cheaper option until it fits."""
    found = list(choice)
    total = sum(row[option] for row, option in zip(costs, found, strict=True))
    while total > budget:
        layer = draw.choice([index for index, row in enumerate(costs) if row[found[index]] > min(row)])
        cheaper = [option for option, cost in enumerate(costs[layer]) if cost < costs[layer][found[layer]]]
        option = max(cheaper, key=lambda option: costs[layer][option])
        total -= costs[layer][found[layer]] - costs[layer][option]
        found[layer] = option
    return tuple(found)


def _fresh(costs, budget: int, draw: random.Random) -> Choice:
    return repaired(tuple(draw.randrange(len(row)) for row in costs), costs, budget, draw)


def _child(parents: list[Choice], costs, budget: int, draw: random.Random, mutation: float, crossed: bool) -> Choice:
    first, second = draw.choice(parents), draw.choice(parents)
    if crossed:
        child = tuple(draw.choice(pair) for pair in zip(first, second, strict=True))
    else:
        child = tuple(draw.randrange(len(row)) if draw.random() < mutation else option for row, option in zip(costs, first, strict=True))
    return repaired(child, costs, budget, draw)
