"""Sharing a budget out: the knapsack is optimal and never overspends; evolution never overspends and repeats itself."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.quant.allocation import RESOLUTION, Infeasible, knapsack
from dite.quant.evolution import Settings, evolve

layer = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 100)), min_size=1, max_size=4)
problems = st.tuples(st.lists(layer, min_size=1, max_size=5), st.integers(0, 150))


def tables(layers):
    return [[cost for cost, _ in row] for row in layers], [[error for _, error in row] for row in layers]


def brute_force(costs, errors, budget):
    totals = [
        sum(row[option] for row, option in zip(errors, choice, strict=True))
        for choice in product(*(range(len(row)) for row in costs))
        if sum(row[option] for row, option in zip(costs, choice, strict=True)) <= budget
    ]
    return min(totals, default=None)


@settings(max_examples=150, deadline=None)
@given(problems)
def test_the_knapsack_equals_brute_force(problem):
    costs, errors = tables(problem[0])
    wanted = brute_force(costs, errors, problem[1])
    if wanted is None:
        with pytest.raises(Infeasible):
            knapsack(costs, errors, problem[1])
    else:
        found = knapsack(costs, errors, problem[1])
        assert found.cost <= problem[1] and found.error == pytest.approx(wanted)


@settings(max_examples=100, deadline=None)
@given(problems, st.integers(1, 10**9))
def test_the_budget_is_never_exceeded_when_costs_are_rounded(problem, scale):
    costs, errors = tables(problem[0])
    costs, budget = [[cost * scale + 1 for cost in row] for row in costs], problem[1] * scale + RESOLUTION
    if sum(map(min, costs)) <= budget:
        found = knapsack(costs, errors, budget)
        assert sum(row[option] for row, option in zip(costs, found.choice, strict=True)) == found.cost <= budget


def test_the_frontier_falls_as_the_budget_grows():
    costs, errors = [[1, 5, 9]] * 4, [[9.0, 3.0, 1.0]] * 4
    frontier = knapsack(costs, errors, 36).frontier
    assert frontier[0] == (4, 36.0) and frontier[-1] == (36, 4.0)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(frontier))


def test_an_infeasible_budget_says_what_the_least_is():
    with pytest.raises(Infeasible) as caught:
        knapsack([[5, 7], [6]], [[1.0, 0.5], [1.0]], 10)
    assert caught.value.least == 11


def fitness(choice):
    return sum((option - 1) ** 2 for option in choice)


def test_evolution_finds_the_optimum_of_an_easy_problem_within_budget():
    costs = [[1, 2, 3]] * 6
    choice, error = evolve(costs, 12, fitness, [(2,) * 6], seed=3)
    assert choice == (1,) * 6 and error == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 18), st.integers(0, 1000))
def test_evolution_measures_nothing_over_the_budget_and_repeats_itself(budget, seed):
    costs = [[1, 2, 3]] * 6
    seen = []
    how = Settings(population=8, generations=3, parents=3)
    first = evolve(costs, budget, lambda choice: seen.append(choice) or fitness(choice), [(2,) * 6], seed, how)
    assert all(sum(option + 1 for option in choice) <= budget for choice in seen)
    assert first == evolve(costs, budget, fitness, [(2,) * 6], seed, how)
