"""`dite quantize --search`: what it leaves behind, how it is resumed, and what it answers to wrong use."""

import json

import pytest

QUICK = [
    part
    for change in (
        "calibration.num_samples=8",
        "calibration.num_steps=4",
        "calibration.num_calls=8",
        "rounding=nearest",
        "search.bits=[4,8]",
        "search.group_sizes=[null]",
        "search.transforms=[none]",
        "search.max_forwards=2600",
    )
    for part in ("--set", change)
]


@pytest.fixture
def search(run, model_folder, tmp_path):
    return lambda *arguments: run("quantize", model_folder, "-o", tmp_path / "small", *QUICK, *arguments)


def test_a_search_leaves_its_plan_as_data_and_as_a_page_and_the_folder_verifies(search, tmp_path, run):
    outcome = search("--search", "dp", "--budget-bits", "7", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert outcome.document["search"]["search"]["strategy"] == "dp" and plan["error"] == outcome.document["search"]["error"]
    assert "<svg" in (tmp_path / "small" / "plan.html").read_text()
    assert run("inspect", tmp_path / "small").code == 0 and not (tmp_path / "small.journal").exists()


def test_a_budget_that_no_plan_fits_names_the_smallest(search, tmp_path):
    outcome = search("--search", "dp", "--budget-bits", "3", "--json")
    assert outcome.code == 2 and "the smallest that" in outcome.document["error"]["why"]
    assert not (tmp_path / "small").exists() and not (tmp_path / "small.journal").exists()


def test_a_search_without_a_budget_is_refused(search):
    outcome = search("--search", "dp")
    assert outcome.code == 2 and "needs a budget" in outcome.err


def test_a_budget_without_a_search_is_refused(search):
    outcome = search("--budget-bytes", "100000")
    assert outcome.code == 2 and "set strategy to dp or evolution" in outcome.err


@pytest.mark.parametrize("flags", [("--search", "dp", "--budget-bits", "7"), ()])
def test_an_interrupted_run_is_not_thrown_away_unasked(search, tmp_path, flags):
    (tmp_path / "small.journal").mkdir()
    (tmp_path / "small.journal" / "calls.safetensors").touch()
    outcome = search(*flags)
    assert outcome.code == 5 and "--resume" in outcome.err


def test_a_run_interrupted_before_it_did_anything_is_no_obstacle(search, tmp_path):
    (tmp_path / "small.journal").mkdir()
    (tmp_path / "small.journal" / "header.json").write_text("{")
    assert search().code == 0 and not (tmp_path / "small.journal").exists()


def test_resuming_what_was_never_begun_is_refused(search):
    assert search("--search", "dp", "--budget-bits", "7", "--resume").code == 5
    assert search("--resume").code == 5
    outcome = search("--effort", "fast", "--resume")
    assert outcome.code == 2 and "this recipe rounds" in outcome.err


def test_effort_is_part_of_the_recipe(search, tmp_path):
    outcome = search("--effort", "fast", "--json")
    assert outcome.code == 0 and outcome.document["recipe"]["effort"] == "fast"


def test_a_budget_given_replaces_the_recipes_own(search):
    outcome = search("--recipe", "w4a8-mixed", "--budget-bytes", "1000")
    assert outcome.code == 2 and "no plan fits a budget of 1000" in outcome.err


def test_a_dry_run_says_that_the_search_will_change_the_plan(search):
    outcome = search("--search", "dp", "--budget-bits", "7", "--dry-run")
    assert outcome.code == 0 and "it changes them within its budget" in " ".join(outcome.out.split())
