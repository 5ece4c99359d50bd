"""How often intervals hold the truth, of Gaussian features: a few runs here, and what many runs found in docs/results/interval-coverage.json."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from interval_coverage import UNLIKE, World, cmmd_run, fid_run, kid_run, manifold_run, measure, paired_run, score_run

FOUND = Path(__file__).resolve().parents[2] / "docs/results/interval-coverage.json"
SMALL = World.of(6, 200, UNLIKE)
RUNS = 100


@pytest.mark.parametrize(
    ("run", "truths"),
    [
        (partial(fid_run, infinity=False), {"fid": SMALL.fid()}),
        (paired_run, {"fid difference": SMALL.fid_difference()}),
        (kid_run, {"kid": SMALL.kid()}),
        (cmmd_run, {}),
        (manifold_run, {}),
    ],
)
def test_nine_of_ten_90_percent_intervals_hold_the_truth(run, truths):
    for row in measure(SMALL, UNLIKE, run, truths, RUNS):
        truth = "this n" if "this n" in row else "population"
        assert row[truth]["90%"] >= 0.81, row  # 0.9 less 3 standard errors of 100 runs
        assert row[truth]["95%"] >= row[truth]["90%"]


def test_inception_scores_too():
    world = World.of(12, 200, UNLIKE)
    assert all(row["this n"]["90%"] > 0.86 for row in measure(world, UNLIKE, score_run, {}, 4 * RUNS))


def test_the_closed_forms_are_what_many_samples_tend_to():
    world = World.of(6, 6000, UNLIKE)
    generator = torch.Generator().manual_seed(1)
    fid, kid = (next(iter(run(world, generator).values())) for run in (partial(fid_run, infinity=False), kid_run))
    assert abs(fid.value - world.fid()) < 4 * fid.error and abs(kid.value - world.kid()) < 4 * kid.error
    assert max(fid.error / fid.value, kid.error / kid.value) < 0.1


def test_the_recorded_runs_are_enough_and_none_of_their_90_percent_intervals_covers_less_than_85():
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    assert found["within"]["90%"] <= 0.02 and found["done"] == found["cases"], "go on with: python evals/interval_coverage.py"
    rows = [row for row in found["rows"] if row["n"] > 5 * row["features"]]
    assert all(row["this n"]["90%"] >= 0.85 for row in rows if "this n" in row)
    assert all(row["population"]["90%"] >= 0.85 for row in rows if "population" in row and not row["interval"].startswith("fid, "))
