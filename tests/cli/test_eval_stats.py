"""`dite eval stats` as a user meets it."""

import numpy as np
import pytest

from dite_evals.extractors import load_extractor
from dite_evals.statistics import read_statistics

BUILTIN = ("--extractor", "builtin:cifar10-dit")


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "samples.npz", np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    return tmp_path / "samples.npz"


def test_it_prints_what_it_wrote(run, npz, tmp_path):
    outcome = run("eval", "stats", npz, "-o", tmp_path / "new" / "s.safetensors", *BUILTIN, "--keep-features", 3, "--json")
    assert outcome.code == 0, outcome.err
    document, written = outcome.document, read_statistics(tmp_path / "new" / "s.safetensors")
    assert {"output", "n", "extractor", "data", "data_sha256", "num_features", "num_spatial", "kept_features", "seconds"} <= document.keys()
    assert (document["n"], document["num_features"], document["kept_features"]) == (12, 192, 3)
    assert written.facts() == {key: document[key] for key in written.facts()}


def test_the_file_serves_a_protocol(run, npz, tmp_path, model_folder):
    assert run("eval", "stats", npz, "-o", tmp_path / "s.safetensors", *BUILTIN).code == 0
    protocol = ("--protocol", "smoke", "--set", f"statistics={tmp_path / 's.safetensors'}", "--n", 10, "--steps", 1)
    outcome = run("eval", "fid", model_folder, *protocol, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["extractor"] == read_statistics(tmp_path / "s.safetensors").extractor_id


def test_a_protocol_s_statistics_of_another_extractor_are_refused(run, npz, tmp_path, model_folder):
    from dataclasses import replace

    from dite_evals.statistics import write_statistics

    assert run("eval", "stats", npz, "-o", tmp_path / "s.safetensors", *BUILTIN).code == 0
    write_statistics(tmp_path / "other.safetensors", replace(read_statistics(tmp_path / "s.safetensors"), extractor_id="other/raw/sha256:0"))
    outcome = run("eval", "fid", model_folder, "--protocol", "smoke", "--set", f"statistics={tmp_path / 'other.safetensors'}")
    assert outcome.code == 2 and "belong to another extractor" in outcome.err


def test_adm_s_layout_is_written_and_read_again(run, npz, tmp_path):
    first = run("eval", "stats", npz, "-o", tmp_path / "a.safetensors", *BUILTIN, "--json")
    assert run("eval", "stats", tmp_path / "a.safetensors", "-o", tmp_path / "adm.npz").code == 0
    assert run("eval", "stats", npz, "-o", tmp_path / "direct.npz", *BUILTIN).code == 0
    for imported in ("adm.npz", "direct.npz"):
        command = ("eval", "stats", tmp_path / imported, "-o", tmp_path / "back.safetensors", "--n", 12, "--overwrite")
        outcome = run(*command, "--extractor", first.document["extractor"])
        assert outcome.code == 0, outcome.err
        before, after = read_statistics(tmp_path / "a.safetensors"), read_statistics(tmp_path / "back.safetensors")
        assert before.moments.sigma.equal(after.moments.sigma) and before.extractor_id == after.extractor_id


def test_a_dry_run_counts_and_writes_nothing(run, npz, tmp_path):
    outcome = run("eval", "stats", npz, "-o", tmp_path / "s.safetensors", *BUILTIN, "--n", 5, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.document["does"], outcome.document["n"]) == ("compute", 5) and not (tmp_path / "s.safetensors").exists()
    assert outcome.document["extractor"] == load_extractor(str(_builtin())).id


def _builtin():
    from dite.models.builtin import builtin_folder

    return builtin_folder("cifar10-dit")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-o", "s.pt", *BUILTIN), "known: .safetensors, .npz"),
        (("-o", "s.npz", *BUILTIN, "--keep-features", 2), "no place for them"),
        (("-o", "s.safetensors"), "no extractor was named"),
        (("-o", "s.safetensors", "--extractor", "inceptoin"), "did you mean inception?"),
        (("-o", "s.safetensors", "--extractor", "inception"), "dite convert"),
        (("-o", "s.safetensors", "--extractor", "dinov2", "--weights", "absent"), "no folder absent"),
        (("-o", "s.safetensors", *BUILTIN, "--weights", "w"), "holds its own"),
        (("-o", "s.safetensors", *BUILTIN, "--resize", "clean"), "resizes nothing"),
        (("-o", "s.safetensors", *BUILTIN, "--image-size", "16"), "it takes 32×32"),
        (("-o", "s.safetensors", *BUILTIN, "--split", "train"), "leave --split out"),
        (("-o", "s.safetensors", *BUILTIN, "--n", "13"), "use --n 12 or less"),
        (("-o", "s.safetensors", *BUILTIN, "--keep-features", "13"), "keep 0 to 12"),
        (("-o", "s.safetensors", *BUILTIN, "--device", "tpu"), "unknown device"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_to_try(run, npz, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    outcome = run("eval", "stats", npz, *arguments)
    assert outcome.code == 2 and reason in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_nothing_is_replaced_unasked(run, npz, tmp_path):
    (tmp_path / "s.safetensors").write_text("hours of work")
    outcome = run("eval", "stats", npz, "-o", tmp_path / "s.safetensors", *BUILTIN, "--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "OutputExists"
    assert (tmp_path / "s.safetensors").read_text() == "hours of work"
    assert run("eval", "stats", npz, "-o", tmp_path / "s.safetensors", *BUILTIN, "--overwrite").code == 0
