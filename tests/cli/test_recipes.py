"""`dite recipes` and `dite doctor`."""

import sys

from dite.cli import doctor
from dite.recipe import load_recipe, recipe_names


def test_all_recipes_are_listed_with_what_they_do(run):
    outcome = run("recipes", "--json")
    assert [entry["name"] for entry in outcome.document["recipes"]] == recipe_names()
    assert all(entry["description"] for entry in outcome.document["recipes"])


def test_a_printed_recipe_is_a_valid_recipe_file(run, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(run("recipes", "w4a8").out)
    assert load_recipe(path) == load_recipe("w4a8")


def test_the_document_of_a_recipe_is_its_contents(run):
    assert load_recipe(run("recipes", "w8a8", "--json").document["recipe"]) == load_recipe("w8a8")


def test_an_unknown_recipe_names_the_nearest(run):
    outcome = run("recipes", "w4a9")
    assert outcome.code == 2 and "did you mean w4a8?" in outcome.err


def test_protocols_are_listed_apart_from_recipes(run):
    listed = run("recipes", "--kind", "eval", "--json").document["recipes"]
    assert all(entry["kind"] == "eval" for entry in listed)
    assert "w4a8" not in [entry["name"] for entry in listed]


def test_doctor_says_which_backends_work_and_why(run):
    document = run("doctor", "--json").document
    assert document["python"] == sys.version.split()[0]
    assert document["cpu"]["cores"] >= 1
    assert {"name", "ok", "reason"} <= document["backends"][0].keys()
    assert all(backend["reason"] for backend in document["backends"])


def test_doctor_fails_as_unsupported_when_a_package_is_missing(run, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "diffusers" else "1.0")
    outcome = run("doctor", "--json")
    assert outcome.code == 3
    assert outcome.document["error"]["what"] == "missing packages: diffusers"
