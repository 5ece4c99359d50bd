"""`dite eval` as a user meets it."""

import json

import pytest
import torch


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    """The tiny pipeline as a plain diffusers folder."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_fidelity_prints_the_fixed_keys_and_writes_a_report(run, folder, tmp_path):
    outcome = run("eval", "fidelity", folder, "--baseline", folder, "--n", 2, "--steps", 2, "-o", tmp_path / "r", "--json")
    assert outcome.code == 0, outcome.err
    assert {"n", "psnr", "ssim", "latent_relative_error", "per_step_error", "seconds"} <= outcome.document.keys()
    assert outcome.document["psnr"].keys() >= {"mean", "p05"} and len(outcome.document["per_step_error"]) == 2
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["command"] == f"dite eval fidelity {folder} --protocol fidelity-128 --baseline {folder} --device cpu --n 2 --steps 2"
    assert (tmp_path / "r" / "report.html").is_file()


def test_a_dry_run_answers_with_the_protocol_and_writes_nothing(run, folder, tmp_path):
    changes = ("--set", "steps=7", "--set", "micro_batch=5", "--n", 11)
    outcome = run("eval", "fidelity", folder, "--baseline", folder, *changes, "-o", tmp_path / "r", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["overrides"] == {"n": 11, "steps": 7, "micro_batch": 5} and outcome.document["micro_batches"] == 2 * 3
    assert not (tmp_path / "r").exists()


def test_the_protocol_beside_a_report_measures_the_same_again(run, folder, tmp_path):
    first = run("eval", "fidelity", folder, "--baseline", folder, "--set", "steps=9", "--steps", 2, "--n", 3, "-o", tmp_path / "r", "--json")
    again = run("eval", "fidelity", folder, "--baseline", folder, "--protocol", tmp_path / "r" / "protocol.yaml", "--json")
    assert first.code == again.code == 0, first.err + again.err
    assert len(again.document["per_step_error"]) == 2 and again.document["n"] == 3  # the flag won over --set


def test_an_unknown_key_of_the_protocol_is_refused_before_anything_is_loaded(run):
    outcome = run("eval", "fid", "no/such/model", "--protocol", "cifar10-5k", "--set", "stepz=3")
    assert outcome.code == 2 and "did you mean steps?" in outcome.err


def test_a_gate_that_fails_still_prints_the_figures_and_the_report(run, folder, tmp_path):
    outcome = run(
        "eval", "fidelity", folder, "--baseline", folder, "--n", 2, "--steps", 1, "-o", tmp_path / "r", "--fail-if", "psnr.mean<101", "--json"
    )
    assert outcome.code == 4
    assert outcome.document["psnr"]["mean"] == 100 and outcome.document["error"]["type"] == "QualityGateFailed"
    assert "psnr.mean is 100" in outcome.err and json.loads((tmp_path / "r" / "report.json").read_text())["kind"] == "fidelity"


def test_an_unknown_gate_key_is_refused_before_anything_is_loaded(run):
    outcome = run("eval", "fidelity", "no/such/model", "--baseline", "none/such", "--fail-if", "psnr.men<30")
    assert outcome.code == 2 and "did you mean psnr.mean" in outcome.err


def test_an_unknown_protocol_is_refused_before_anything_is_loaded(run):
    outcome = run("eval", "fid", "no/such/model", "--protocol", "cifar10-5", "--json")
    assert outcome.code == 2 and "did you mean cifar10-5k" in outcome.document["error"]["try"]


def test_fid_takes_a_protocol_file_and_resumes_only_its_own(run, folder, tmp_path):
    import yaml

    from dite_evals.classifier import SmallClassifier
    from dite_evals.extractors import load_classifier, save_classifier
    from dite_evals.statistics import compute_statistics, write_statistics

    save_classifier(SmallClassifier(), folder, "toy", 32)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    write_statistics(folder / "statistics.safetensors", compute_statistics(load_classifier(folder), images, "noise"))
    protocol = {"name": "mine", "kind": "fid", "n": 10, "steps": 1, "guidance": 1.0, "extractor": str(folder), "statistics": str(folder)}
    protocol["allow_few"] = True
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(protocol))
    command = ("eval", "fid", folder, "--protocol", tmp_path / "mine.yaml", "-o", tmp_path / "r", "--json")
    first = run(*command)
    assert first.code == 0, first.err
    assert {"fid", "n", "interval", "fid_infinity", "extractor", "protocol", "seconds"} <= first.document.keys()
    conflict = run(*command, "--seed", 3)
    assert conflict.code == 5 and conflict.document["error"]["type"] == "ResumeConflict"
    assert run(*command, "--seed", 3, "--discard").code == 0


def test_compare_shows_two_reports_side_by_side(run, folder, tmp_path):
    for name in ("a", "b"):
        assert run("eval", "fidelity", folder, "--baseline", folder, "--n", 2, "--steps", 1, "-o", tmp_path / name).code == 0
    outcome = run("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert outcome.code == 0 and "psnr.mean" in outcome.out and "does not tell the two apart" in outcome.out
