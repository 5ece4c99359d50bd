"""What a simulation records of changes, and a schedule made of it."""

import pytest
import torch

import dite
from dite.errors import UsageError
from dite.parallel.budget import allocate
from dite.parallel.rates import SQUARED_ERRORS

CALL = {"class_labels": [1, 2], "num_inference_steps": 4, "output_type": "np"}


def draw(pipe):
    return pipe(**CALL, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]).images


@pytest.fixture
def recorded(tiny_pipeline):
    with dite.parallelize(tiny_pipeline, 2, codec="int8", simulate=True) as par:
        draw(tiny_pipeline)
        return par.changes(), par.profile()


def test_changes_have_a_row_a_step_after_the_first_and_a_column_a_layer(recorded):
    table, _ = recorded
    assert {name: (len(rows), len(rows[0])) for name, rows in table.items()} == {"change": (3, 2), "correlation": (3, 2)}
    assert all(0 <= value < 10 for row in table["change"] for value in row) and all(-1 <= value <= 1 for row in table["correlation"] for value in row)


def test_a_profile_has_what_one_rank_sends(recorded):
    _, profile = recorded
    assert profile.ranks == 2 and profile.shapes == ((2 * 4 * 8, 48),) * 2  # keys and values of 4 rows (guidance), 8 of 16 tokens, 48 wide


def test_a_schedule_within_a_budget_draws_pictures(recorded, tiny_pipeline):
    schedule = allocate(recorded[1], 40_000, SQUARED_ERRORS[2]).schedule
    with dite.parallelize(tiny_pipeline, 2, codec=schedule, simulate=True) as par:
        assert draw(tiny_pipeline).shape == (2, 32, 32, 3)
    assert par.stats()["codec"].startswith("schedule ")


def test_only_a_simulation_records_changes(tiny_pipeline):
    with dite.parallelize(tiny_pipeline, 1) as par, pytest.raises(UsageError, match="simulate=True"):
        par.profile()
