"""dite.evaluate from end to end, on a tiny pipeline."""

import json
import os
import sys

import pytest
import torch

import dite
from dite.errors import (
    CheckpointError,
    DiteError,
    NonFiniteOutput,
    OutputInUse,
    RecipeError,
    ResumeConflict,
    UnsupportedEnvironment,
    UnsupportedModel,
    UsageError,
)
from dite.evaluation import FID_KEYS, FIDELITY_KEYS
from dite.models.digest import model_digest, plain_tensors
from dite.outputs import OutputLock
from dite_evals import figures
from dite_evals.protocols import balanced, load_protocol
from dite_evals.shards import claim

QUICK = {"n": 3, "steps": 2}


@pytest.fixture
def counted(monkeypatch, pipe):
    """How many micro-batches the pipeline has drawn."""
    calls = []
    inner = type(pipe).__call__

    def counting(self, class_labels, *args, **kwargs):
        calls.append(class_labels)
        return inner(self, class_labels, *args, **kwargs)

    counting.__wrapped__ = inner
    monkeypatch.setattr(type(pipe), "__call__", counting)
    return calls


def test_a_model_equals_itself(pipe):
    metrics = dite.evaluate(pipe, baseline=pipe, **QUICK)
    assert metrics["n"] == 3 and metrics["psnr"]["mean"] == 100.0 and metrics["ssim"] == pytest.approx(1)
    assert metrics["latent_relative_error"] == 0 and metrics["per_step_error"] == [0, 0]


def test_a_worse_model_is_measured_and_reported(pipe, worse_pipe, tmp_path):
    metrics = dite.evaluate(worse_pipe, baseline=pipe, output=tmp_path / "r", **QUICK)
    assert 0.001 < metrics["latent_relative_error"] < 1 and 20 < metrics["psnr"]["p05"] <= metrics["psnr"]["mean"] < 80
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["metrics"]["psnr"] == metrics["psnr"] and len(document["samples"]) == 3
    assert document["configuration"]["overrides"] == {"n": 3, "steps": 2} and document["command"] == ""


def test_the_gate_keys_are_keys_of_the_answer(pipe, worse_pipe, smoke):
    from dite.cli.gate import _lookup

    fidelity, fid = dite.evaluate(worse_pipe, baseline=pipe, **QUICK), dite.evaluate(pipe, smoke)
    assert set(figures.NAMES) <= set(FID_KEYS)
    assert all(_lookup(fidelity, key.replace("N", "0")) is not None for key in FIDELITY_KEYS)
    assert all(_lookup(fid, key) is not None or key.partition("_interval")[0] in fid["left_out"] for key in FID_KEYS)


def test_fidelity_without_a_baseline_says_what_to_give(pipe):
    with pytest.raises(UsageError, match="baseline"):
        dite.evaluate(pipe)


def test_a_bare_model_is_refused(pipe):
    with pytest.raises(UnsupportedModel, match="whole diffusers pipeline"):
        dite.evaluate(pipe.transformer, baseline=pipe, **QUICK)


def test_sources_are_loaded_in_the_protocol_s_precision(pipe, monkeypatch):
    import dite.models.load

    asked = []
    monkeypatch.setattr(dite.models.load, "load_pipeline", lambda source, *, dtype=None, device="cpu": asked.append((source, dtype, device)) or pipe)
    dite.evaluate("model", baseline="base", dtype="float32", **QUICK)
    assert asked == [("base", "float32", "cpu"), ("model", "float32", "cpu")]


def test_a_pipeline_in_another_precision_than_the_protocol_s_is_refused(pipe, smoke):
    with pytest.raises(UsageError, match="bfloat16"):
        dite.evaluate(pipe, smoke | {"dtype": "bfloat16"})


def test_fid_has_the_fixed_keys_and_repeats_exactly(pipe, smoke):
    first, second = dite.evaluate(pipe, smoke), dite.evaluate(pipe, smoke)
    assert {"fid", "n", "interval", "fid_infinity", "extractor", "protocol", "seconds"} <= first.keys()
    assert first["fid"] == second["fid"] and first["interval"][0] <= first["fid"] <= first["interval"][1]
    assert first["extractor"].startswith("toy/")


def test_an_interrupted_fid_goes_on_and_gives_the_same_number(pipe, smoke, tmp_path, counted):
    whole = dite.evaluate(pipe, smoke)["fid"]
    counted.clear()

    def interrupt(stage, done, total):
        if done == 5:  # two steps a micro-batch: in the third of three
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dite.evaluate(pipe, smoke, output=tmp_path / "r", progress=interrupt)
    assert len(counted) == 3 and not (tmp_path / "r").exists()
    counted.clear()
    assert dite.evaluate(pipe, smoke, output=tmp_path / "r")["fid"] == whole
    assert len(counted) == 1


def test_features_alone_are_kept_on_request_and_give_the_same_number(pipe, smoke, tmp_path, counted, monkeypatch):
    monkeypatch.setattr("dite_evals.fid_run.SHEET", 4)
    whole = dite.evaluate(pipe, smoke, output=tmp_path / "whole")
    small = dite.evaluate(pipe, smoke, output=tmp_path / "small", features_only=True)
    assert small["features_sha256"] == whole["features_sha256"] and small["fid"] == whole["fid"]
    kept = sorted(path.name for path in (tmp_path / "small.samples").glob("shard-*"))
    assert kept == ["shard-000000.safetensors"] and len(list((tmp_path / "whole.samples").glob("shard-*"))) == 3
    counted.clear()
    assert dite.evaluate(pipe, smoke, output=tmp_path / "small", features_only=True)["fid"] == whole["fid"] and counted == []


def test_features_of_another_extractor_are_not_taken_for_its_own(pipe, smoke, tmp_path, counted, monkeypatch):
    from dite_evals.extractors import Extractor

    first = dite.evaluate(pipe, smoke, output=tmp_path / "r")
    counted.clear()
    monkeypatch.setattr(Extractor, "id", "other/raw/sha256:" + "1" * 64)
    monkeypatch.setattr("dite_evals.statistics.Statistics.require", lambda *_: None)
    assert dite.evaluate(pipe, smoke, output=tmp_path / "r")["features_sha256"] == first["features_sha256"]
    assert counted == [] and len(list((tmp_path / "r.samples").glob("features-*"))) == 2


def test_a_full_disk_is_said_with_its_bytes_and_what_was_drawn_is_kept(pipe, smoke, tmp_path, counted, monkeypatch):
    from pathlib import Path

    whole, write = dite.evaluate(pipe, smoke)["fid"], Path.write_bytes
    counted.clear()

    def full(path, data):
        if path.name.startswith("shard-000008"):
            write(path, data[:100])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiteError, match=r"No space left on device; it takes \d+ bytes"):
        dite.evaluate(pipe, smoke, output=tmp_path / "r")
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "r.samples").iterdir())
    assert len(counted) == 3 and names == ["config.json", "shard-000000.safetensors", "shard-000004.safetensors"]  # no piece of the third
    assert dite.evaluate(pipe, smoke, output=tmp_path / "r")["fid"] == whole


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda data: data[:-1], lambda data: data.replace(b"count", b"Count")])
def test_a_damaged_shard_is_named_and_not_used(pipe, smoke, tmp_path, damage):
    dite.evaluate(pipe, smoke, output=tmp_path / "r")
    path = next((tmp_path / "r.samples").glob("features-*/shard-*"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"features-.*shard-000000"):
        dite.evaluate(pipe, smoke, output=tmp_path / "r")


def test_fewer_samples_than_features_are_refused_before_anything_is_loaded_unless_forced(pipe, smoke):
    honest = smoke | {"allow_few": False}
    with pytest.raises(UsageError, match="12 samples are too few for a Fréchet distance of 192 features"):
        dite.evaluate("no/such/model", honest)
    assert dite.evaluate(pipe, honest, force=True)["fid"] == dite.evaluate(pipe, smoke)["fid"]


def test_a_protocol_that_waits_for_its_reference_says_so(pipe, smoke):
    with pytest.raises(UsageError, match="dite eval stats"):
        dite.evaluate(pipe, smoke | {"statistics": None})


def test_nan_features_are_refused_with_the_image(pipe, smoke, tmp_path, monkeypatch):
    from dite_evals.classifier import SmallClassifier

    inner = SmallClassifier.outputs

    def broken(self, images):
        found = inner(self, images)
        found["features"][5] = float("nan")
        return found

    monkeypatch.setattr(SmallClassifier, "outputs", broken)
    with pytest.raises(NonFiniteOutput, match="image 5"):
        dite.evaluate(pipe, smoke)


def test_a_longer_run_goes_on_from_a_shorter_one_whose_last_batch_was_ragged(pipe, smoke, tmp_path, counted):
    whole = dite.evaluate(pipe, smoke, n=15)["fid"]
    dite.evaluate(pipe, smoke, n=10, output=tmp_path / "r")
    counted.clear()
    assert dite.evaluate(pipe, smoke, n=15, output=tmp_path / "r")["fid"] == whole
    assert len(counted) == 2  # samples 8 to 15: the ragged batch of 8 and 9 again, in full


def test_a_longer_run_with_large_shards_keeps_what_it_drew(pipe, smoke, tmp_path, counted):
    dite.evaluate(pipe, smoke, n=10, batch_size=16, output=tmp_path / "r")
    whole = dite.evaluate(pipe, smoke, n=15, batch_size=8, output=tmp_path / "r")["fid"]
    counted.clear()
    assert dite.evaluate(pipe, smoke, n=15, output=tmp_path / "r")["fid"] == whole
    assert counted == []


def test_the_shard_size_changes_no_result(pipe, smoke, tmp_path):
    numbers = {dite.evaluate(pipe, smoke, batch_size=size, output=tmp_path / str(size))["fid"] for size in (1, 8, 100)}
    assert len(numbers) == 1
    assert len(list((tmp_path / "8.samples").glob("shard-*"))) == 2


def test_a_changed_configuration_refuses_the_shards_unless_forced(pipe, worse_pipe, smoke, tmp_path):
    dite.evaluate(pipe, smoke, output=tmp_path / "r")
    with pytest.raises(ResumeConflict, match="steps was 2, now 3") as refused:
        dite.evaluate(pipe, smoke, steps=3, output=tmp_path / "r")
    assert refused.value.exit_code == 5
    with pytest.raises(ResumeConflict, match="model was"):
        dite.evaluate(worse_pipe, smoke, output=tmp_path / "r")
    assert dite.evaluate(worse_pipe, smoke, output=tmp_path / "r", discard=True)["fid"] == dite.evaluate(worse_pipe, smoke)["fid"]


def test_two_runs_do_not_draw_into_one_folder(pipe, smoke, tmp_path):
    with OutputLock(tmp_path / "r.samples"), pytest.raises(OutputInUse, match=f"process {os.getpid()} on"):
        dite.evaluate(pipe, smoke, output=tmp_path / "r")
    assert dite.evaluate(pipe, smoke, output=tmp_path / "r")["n"] == 12


def test_other_classes_are_another_model(pipe, smoke, tmp_path):
    before = model_digest(pipe)
    dite.evaluate(pipe, smoke, output=tmp_path / "r")
    pipe.register_to_config(id2label={"1": "cat"})
    assert model_digest(pipe) != before
    with pytest.raises(ResumeConflict, match="model was"):
        dite.evaluate(pipe, smoke, output=tmp_path / "r")


def test_a_report_that_could_not_be_finished_is_written_over_the_next_time(pipe, smoke, tmp_path, counted):
    whole = dite.evaluate(pipe, smoke, output=tmp_path / "r")["fid"]
    (tmp_path / "r" / "report.json").unlink()
    (tmp_path / "r" / "report.html.17.partial").write_text("half")
    counted.clear()
    assert dite.evaluate(pipe, smoke, output=tmp_path / "r")["fid"] == whole and counted == []


def test_a_forced_report_warns_and_its_protocol_can_be_run_again(pipe, smoke, tmp_path):
    import yaml

    metrics = dite.evaluate(pipe, smoke | {"allow_few": False}, force=True, output=tmp_path / "r", steps=1)
    assert "12 samples of 192 features" in (tmp_path / "r" / "report.md").read_text()
    saved = yaml.safe_load((tmp_path / "r" / "protocol.yaml").read_text())
    again = dite.evaluate(pipe, tmp_path / "r" / "protocol.yaml")
    assert saved["name"] == "tiny, changed" == again["protocol"] and again["fid"] == metrics["fid"]


def test_a_correction_for_n_is_left_out_where_its_interval_would_be_wrong(pipe, smoke):
    metrics = dite.evaluate(pipe, smoke)
    assert metrics["fid_corrected"] is None and "too few for a correction" in metrics["left_out"]["fid_corrected"]


def test_a_folder_that_is_not_ours_is_not_taken_for_shards(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ResumeConflict, match="not ours"):
        claim(tmp_path, {"a": 1}, discard=True)


def test_too_few_samples_are_refused_before_anything_is_loaded(smoke):
    with pytest.raises(UsageError, match="at least 10"):
        dite.evaluate("no/such/model", smoke, n=9)


def test_the_digest_follows_the_weights_and_the_scheduler_only(pipe, worse_pipe):
    import copy

    assert model_digest(pipe) == model_digest(copy.deepcopy(pipe)) != model_digest(worse_pipe)
    before = model_digest(pipe)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert model_digest(pipe) != before


def test_a_tensor_of_a_librarys_own_class_is_taken_apart_for_the_digest():
    class Coded:
        qdata, scale = torch.ones(2), torch.zeros(3)

        def __tensor_flatten__(self):
            return ["qdata", "scale"], None

    found = [(name, len(value)) for name, value in plain_tensors({"q.weight": Coded(), "q.bias": torch.ones(1)})]
    assert found == [("q.bias", 1), ("q.weight.qdata", 2), ("q.weight.scale", 3)]


def test_without_torchmetrics_the_error_says_what_to_install(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UnsupportedEnvironment, match=r'pip install "dite\[eval\]"') as error:
        dite.evaluate(pipe, baseline=pipe)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("name", ["fidelity-128", "cifar10-5k", "smoke"])
def test_every_built_in_protocol_is_valid_and_named_after_its_file(name):
    protocol, changed = load_protocol(name)
    assert protocol.name == name and changed == {} and protocol.description


def test_cifar10_5k_is_the_protocol_that_was_published():
    protocol, _ = load_protocol("cifar10-5k")
    assert (protocol.n, protocol.steps, protocol.guidance, protocol.seed, protocol.micro_batch, protocol.dtype) == (5000, 20, 1.5, 0, 50, "bfloat16")
    assert balanced(range(10), 5000) == [i % 10 for i in range(5000)]


@pytest.mark.parametrize(
    ("source", "overrides", "reason"),
    [
        ("fidelity-129", {}, "did you mean fidelity-128"),
        ("absent.yaml", {}, "does not exist"),
        ({"name": "x", "kind": "speed"}, {}, "fidelity or fid"),
        ("smoke", {"step": 3}, "did you mean steps"),
        ("smoke", {"steps": 0}, "steps is wrong"),
        ("smoke", {"guidance": float("nan")}, "guidance is wrong"),
    ],
)
def test_a_protocol_with_anything_wrong_is_refused(source, overrides, reason):
    with pytest.raises(RecipeError, match=reason):
        load_protocol(source, **overrides)


def test_a_protocol_of_the_other_kind_is_refused_with_those_that_fit():
    with pytest.raises(RecipeError, match=r"cifar10-5k or .*smoke"):
        load_protocol("fidelity-128", kind="fid")


@pytest.mark.parametrize("count", [1, 10, 64, 65, 100, 997, 1000])
def test_n_samples_of_n_classes_take_each_once(count):
    assert sorted(balanced(range(count), count)) == list(range(count))


@pytest.fixture
def recipe():
    """recipes/cifar10_dit/reference.py, which is a script's neighbour and no package."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[2] / "recipes" / "cifar10_dit" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_statistics_written_by_the_recipe_are_accepted(pipe, recipe, smoke, tmp_path):
    from dite_evals.classifier import SmallClassifier
    from dite_evals.extractors import load_classifier, save_classifier

    save_classifier(SmallClassifier(), tmp_path, "toy", 32, dtype=torch.float16)
    (tmp_path / "config.json").write_text("{}")
    classifier = load_classifier(tmp_path).network
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    recipe.write_statistics(classifier, images, tmp_path / "statistics.safetensors", "noise")
    assert recipe.image_fid(classifier, images, tmp_path / "statistics.safetensors") < 1e-6
    assert dite.evaluate(pipe, smoke | {"extractor": str(tmp_path), "statistics": str(tmp_path)})["n"] == 12
    with pytest.raises(ValueError, match="export it first"):
        recipe.write_statistics(SmallClassifier(), images, tmp_path / "statistics.safetensors", "noise")
