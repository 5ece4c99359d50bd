"""`dite recipes ls | show | validate` and `dite doctor`."""

import sys

import pytest
import yaml

from dite.cli import doctor, recipes
from dite.recipe import load_recipe, recipe_names

ALL = [*recipe_names("quant"), *recipe_names("eval")]


@pytest.fixture
def write(tmp_path):
    """Write changed contents of a built-in recipe into a file."""

    def call(name, **changes):
        kind = "quant" if name in recipe_names() else "eval"
        values = yaml.safe_load((recipes.recipe_folder(kind) / f"{name}.yaml").read_text()) | changes
        path = tmp_path / f"{name}-changed.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
        return path

    return call


@pytest.mark.parametrize("arguments", [(), ("ls",)], ids=["alone", "ls"])
def test_all_recipes_and_protocols_are_listed_with_what_they_do(run, arguments):
    outcome = run("recipes", *arguments, "--json")
    assert [entry["name"] for entry in outcome.document["recipes"]] == ALL
    assert all(entry["description"] for entry in outcome.document["recipes"])


def test_a_person_sees_recipes_and_protocols_in_two_groups(run):
    first, second = run("recipes").out.split("\n\n")
    assert "dite quantize" in first and "w4a8 " in first and "smoke" not in first
    assert "dite eval" in second and "smoke" in second and "w4a8 " not in second


@pytest.mark.parametrize("kind", ["quant", "eval"])
def test_one_kind_is_listed_alone(run, kind):
    listed = run("recipes", "ls", "--kind", kind, "--json").document["recipes"]
    assert [(entry["name"], entry["kind"]) for entry in listed] == [(name, kind) for name in recipe_names(kind)]


def test_a_printed_recipe_is_a_valid_recipe_file(run, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(run("recipes", "show", "w4a8").out)
    assert load_recipe(path) == load_recipe("w4a8")


def test_the_document_of_a_recipe_is_its_contents(run):
    document = run("recipes", "show", "w8a8", "--json").document
    assert load_recipe(document["recipe"]) == load_recipe("w8a8") and document["kind"] == "quant"


def test_show_finds_protocols_and_files_by_itself(run, write):
    assert run("recipes", "show", "smoke", "--json").document["kind"] == "eval"
    document = run("recipes", "show", write("smoke", n=11), "--json").document
    assert document["kind"] == "eval" and document["recipe"]["n"] == 11


def test_an_unknown_recipe_names_the_nearest_of_both_kinds(run):
    outcome = run("recipes", "show", "w4a9")
    assert outcome.code == 2 and "did you mean w4a8?" in outcome.err
    assert "did you mean smoke?" in run("recipes", "show", "smok").err


def test_a_name_that_two_kinds_have_is_refused_as_ambiguous(run, monkeypatch):
    monkeypatch.setattr(recipes, "recipe_names", lambda kind="quant": ["w4a8"])
    outcome = run("recipes", "show", "w4a8")
    assert outcome.code == 2 and "w4a8 is ambiguous" in outcome.err and "quant and eval" in outcome.err


def test_no_name_is_ambiguous_today():
    assert len(ALL) == len(set(ALL))


def test_the_name_of_a_recipe_without_a_command_says_what_to_write(run):
    outcome = run("recipes", "w4a8")
    assert outcome.code == 2 and "dite recipes show w4a8" in outcome.err


def test_all_recipes_that_ship_are_valid(run):
    outcome = run("recipes", "validate", *ALL, "--json")
    assert outcome.code == 0, outcome.out
    assert [(one["name"], one["valid"]) for one in outcome.document["recipes"]] == [(name, True) for name in ALL]


def test_validate_lists_every_problem_of_every_file_and_exits_with_2(run, write):
    wrong = write("smoke", n=0, stepz=3, guidance="much")
    outcome = run("recipes", "validate", wrong, "w4a8", write("w8a8", rank=0), "no.yaml", "--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "RecipeError"
    assert [one["valid"] for one in outcome.document["recipes"]] == [False, True, False, False]
    first = {problem["what"]: problem for problem in outcome.document["recipes"][0]["problems"]}
    assert first.keys() == {"protocol key n is wrong", "protocol key guidance is wrong", "unknown protocol key stepz"}
    assert first["unknown protocol key stepz"]["try"] == "did you mean steps?" and outcome.document["invalid"] == 3


def test_a_person_reads_each_problem_with_what_to_try(run, write):
    outcome = run("recipes", "validate", write("smoke", stepz=3))
    assert outcome.code == 2 and "problem: unknown protocol key stepz" in outcome.out and "try: did you mean steps?" in outcome.out
    assert "1 of 1 recipes can't be used" in outcome.err


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("w4a8", {"defaults": ...}, "neither a recipe nor a protocol"),
        ("smoke", {"kind": "fidd"}, "neither a recipe nor a protocol"),
        ("smoke", {"extractor": ...}, "protocol key extractor is missing"),
        ("w4a8", {"search": {"strategy": "dp"}}, "recipe key search is wrong"),
        ("w4a8", {"calibration": {"num_samples": 2}}, "recipe key calibration.num_samples is wrong"),
    ],
)
def test_validate_names_what_is_wrong(run, write, name, changes, what):
    outcome = run("recipes", "validate", write(name, **changes), "--json")
    (one,) = outcome.document["recipes"]
    assert outcome.code == 2 and len(one["problems"]) == 1 and what in one["problems"][0]["what"]


def test_a_file_that_is_no_yaml_is_one_problem_and_no_crash(run, tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    outcome = run("recipes", "validate", tmp_path / "a.yaml", tmp_path / "b.yaml", "--json")
    assert outcome.code == 2 and [len(one["problems"]) for one in outcome.document["recipes"]] == [1, 1]


def test_what_a_protocol_needs_and_this_machine_lacks_is_a_note(run, write, tmp_path):
    changes = {"extractor": "inception", "weights": str(tmp_path / "w.safetensors"), "statistics": str(tmp_path / "s.safetensors")}
    protocol = write("smoke", **changes)
    outcome = run("recipes", "validate", protocol, "--json")
    (one,) = outcome.document["recipes"]
    assert outcome.code == 0 and one["notes"] == [f"no weights at {changes['weights']}", f"no statistics at {changes['statistics']}"]
    for name in ("w.safetensors", "s.safetensors"):
        (tmp_path / name).touch()
    assert run("recipes", "validate", protocol, "--json").document["recipes"][0]["notes"] == []


def test_weights_that_were_not_given_are_a_note(run, write):
    assert (
        "note: weights are not given: extractor inception needs --set weights=PATH"
        in run("recipes", "validate", write("smoke", extractor="inception")).out
    )


def test_the_extractors_that_need_weights_are_the_named_ones():
    from dite_evals.extractors import NAMED

    assert set(recipes.WITH_WEIGHTS) == set(NAMED)


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
