"""Outputs through the command line: refused early, complete or absent, readable by others."""

import json
import stat

import pytest

import dite


@pytest.fixture
def small(run, model_folder, tmp_path):
    """The tiny model, quantized."""
    assert run("quantize", model_folder, "-o", tmp_path / "small", "--effort", "fast").code == 0
    return tmp_path / "small"


@pytest.mark.parametrize("where", [".", "inside"])
@pytest.mark.parametrize("command", ["generate", "fidelity", "quantize"])
def test_nothing_is_written_into_a_models_folder(run, small, model_folder, command, where):
    arguments = {
        "generate": ("generate", small, "-n", 1, "--steps", 1, "--overwrite"),
        "fidelity": ("eval", "fidelity", small, "--baseline", model_folder, "--n", 2, "--steps", 1),
        "quantize": ("quantize", model_folder),
    }[command]
    outcome = run(*arguments, "-o", small / where, "--json")
    assert outcome.code == 2, outcome.out
    dite.load(small)  # still whole


def test_a_dry_run_names_a_conflict_too(run, small, model_folder):
    assert run("quantize", model_folder, "-o", small, "--dry-run").code == 2


def test_overwriting_keeps_files_that_no_model_put_there(run, small, model_folder):
    (small / "NOTES.txt").write_text("mine")
    outcome = run("quantize", model_folder, "-o", small, "--overwrite", "--effort", "fast")
    assert outcome.code == 2 and "NOTES.txt" in outcome.err and (small / "NOTES.txt").read_text() == "mine"


def test_hidden_files_in_a_models_folder_do_no_harm(small):
    (small / ".DS_Store").touch()
    (small / ".cache").mkdir()
    (small / ".cache" / "lock").touch()
    dite.load(small)


def test_every_file_of_a_model_is_as_readable_as_the_umask_allows(small):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in small.rglob("*") if path.is_file()}
    assert modes == {stat.S_IMODE((small / "dite_manifest.json").stat().st_mode)}


def test_hints_quote_what_a_shell_would_split(run, model_folder, tmp_path):
    outcome = run("quantize", model_folder, "-o", tmp_path / "my model", "--effort", "fast")
    assert f"'{tmp_path / 'my model'}'" in outcome.out


def test_a_gate_and_an_error_say_the_exit_code_alike(run, model_folder):
    arguments = ("eval", "fidelity", model_folder, "--baseline", model_folder, "--n", 2, "--steps", 1, "--json")
    assert run(*arguments, "--fail-if", "ssim<2").document["exit_code"] == 4
    assert run("inspect", "no/where/here", "--json").document["exit_code"] == 2


@pytest.mark.parametrize(("device", "code"), [("cuda:99", 3), ("gpu", 2), ("", 2), ("meta", 2), ("cuda:", 2)])
@pytest.mark.parametrize("command", [("generate", "-n", 1, "--steps", 1), ("eval", "fid", "--protocol", "smoke")])
def test_a_device_that_is_not_there_is_named(run, model_folder, tmp_path, command, device, code):
    (*words,) = command
    words.insert(2 if words[0] == "eval" else 1, model_folder)
    outcome = run(*words, "-o", tmp_path / "o", "--device", device, "--json")
    assert outcome.code == code and device in outcome.document["error"]["what"] and not (tmp_path / "o").exists()


def test_more_steps_than_the_sampler_has_are_refused(run, model_folder, tmp_path):
    outcome = run("generate", model_folder, "--steps", 1001, "-o", tmp_path / "o")
    assert outcome.code == 2 and "at most 1000" in outcome.err


def test_what_stays_wide_is_told(run, model_folder, tmp_path):
    outcome = run("quantize", model_folder, "-o", tmp_path / "wide", "--effort", "fast")  # the tiny model is stored in float32
    assert "--dtype bfloat16" in outcome.out
    document = run("quantize", model_folder, "--dtype", "bfloat16", "-o", tmp_path / "narrow", "--effort", "fast", "--json").document
    assert document["bytes"] <= 1.02 * document["bf16_bytes"]


def test_reports_against_other_baselines_are_not_compared(run, small, model_folder, tmp_path):
    for name, baseline in (("a", model_folder), ("b", small)):
        assert run("eval", "fidelity", small, "--baseline", baseline, "--n", 2, "--steps", 1, "-o", tmp_path / name).code == 0
    outcome = run("eval", "compare", tmp_path / "a", tmp_path / "b", "--json")
    assert outcome.code == 2 and "baseline_sha256" in outcome.document["error"]["why"]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["configuration"]["recipe"] == "w4a8"
