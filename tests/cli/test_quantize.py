"""`dite quantize` and `dite inspect`: the documents scripts read, and what is refused before any work is done."""

import json

import pytest

from dite.recipe import load_recipe


@pytest.fixture
def quantize(run, model_folder, tmp_path):
    """Run `dite quantize` on the tiny model into tmp/small."""
    return lambda *arguments: run("quantize", model_folder, "-o", tmp_path / "small", "--effort", "fast", *arguments)


def test_the_document_has_the_keys_that_scripts_rely_on(quantize, tmp_path):
    document = quantize("--recipe", "w4a8", "--dtype", "bfloat16", "--json").document
    assert document["output"] == str(tmp_path / "small")
    assert {"recipe", "baseline_bytes", "bytes", "seconds", "peak_memory_bytes", "layers", "skipped"} <= document.keys()
    assert {"name", "kind", "weight_bits", "activation_bits", "group_size", "transform", "error"} <= document["layers"][0].keys()
    assert 0 < document["bytes"] < document["baseline_bytes"]


def test_the_resolved_recipe_lies_in_the_output_and_is_valid_input(quantize, tmp_path):
    quantize("--set", "defaults.token.weight.group_size=64")
    assert load_recipe(tmp_path / "small" / "recipe.yaml") == load_recipe("w4a8", ["defaults.token.weight.group_size=64", "effort=fast"])


def test_a_person_is_told_the_ratio_and_what_to_do_next(quantize):
    outcome = quantize("--dtype", "bfloat16")
    assert outcome.code == 0
    assert "times smaller" in outcome.out and "dite eval fidelity" in outcome.out and "dite generate" in outcome.out


def test_a_quantized_folder_draws(quantize, run, tmp_path):
    quantize()
    outcome = run("generate", tmp_path / "small", "-o", tmp_path / "pictures", "--class", "ship", "--steps", 2, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["class_labels"] == [8]


def test_a_dry_run_shows_the_plan_and_writes_nothing(quantize, tmp_path):
    document = quantize("--dry-run", "--json").document
    assert document["layers"][0].keys() >= {"name", "kind", "scheme", "in_features", "out_features"}
    assert document["estimated_bytes"] > 0 and not (tmp_path / "small").exists()


def test_a_dry_run_is_readable_too(quantize):
    outcome = quantize("--dry-run")
    assert outcome.code == 0 and "nothing was written" in outcome.out


def test_an_existing_output_is_refused_unless_told(quantize):
    assert quantize().code == 0
    outcome = quantize("--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "OutputExists"
    assert quantize("--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "w4a9"), "did you mean w4a8?"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--set", "defaults.token.weigth.num_bits=8"), "did you mean weight?"),
        (("--set", "defaults.token.weight.group_size=100"), "multiple of 16"),
    ],
)
def test_a_wrong_recipe_is_answered_with_the_rule(quantize, arguments, words):
    outcome = quantize(*arguments, "--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "RecipeError"
    assert words in json.dumps(outcome.document["error"])


def test_a_model_that_is_quantized_already_is_refused(quantize, run, tmp_path):
    quantize()
    outcome = run("quantize", tmp_path / "small", "-o", tmp_path / "smaller", "--json")
    assert outcome.code == 2 and "quantized already" in outcome.document["error"]["what"]


@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_a_missing_model_is_a_usage_error(run, tmp_path, command):
    output = ("-o", tmp_path / "small") if command == "quantize" else ()
    outcome = run(command, tmp_path / "nowhere", *output, "--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "UsageError"


def test_a_model_without_a_transformer_cannot_be_quantized(run, model_folder, tmp_path):
    outcome = run("quantize", model_folder / "vae", "-o", tmp_path / "small", "--json")
    assert outcome.code == 3 and outcome.document["error"]["type"] == "UnsupportedModel"


def test_inspect_says_why_a_model_cannot_be_quantized(run, model_folder):
    outcome = run("inspect", model_folder / "vae", "--json")
    assert outcome.code == 0
    assert outcome.document["supports"]["quantize"]["ok"] is False and outcome.document["supports"]["quantize"]["reason"]


def test_inspect_says_what_was_found_and_what_is_supported(run, model_folder):
    document = run("inspect", model_folder, "--json").document
    assert document["model_class"] == "DiTTransformer2DModel" and document["parameters"] > 0
    assert document["blocks"][0]["count"] == 2
    assert {linear["kind"] for linear in document["linears"]} == {"token", "conditioning"}
    assert document["supports"]["quantize"]["ok"] is True


def test_inspect_is_readable_too(run, model_folder):
    outcome = run("inspect", model_folder)
    assert outcome.code == 0 and "DiTTransformer2DModel" in outcome.out


def test_an_output_that_another_run_is_writing_is_refused_at_once_with_who_writes_it(quantize, tmp_path):
    import os

    from dite.outputs import OutputLock

    with OutputLock(tmp_path / "small"):
        outcome = quantize("--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "OutputInUse"
    assert f"process {os.getpid()} on" in outcome.document["error"]["why"]
    assert quantize().code == 0
