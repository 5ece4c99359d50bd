"""Spoilt at random, ten thousand times: a saved model is refused, or is the original, or is exactly what its new files say."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

import dite
from dite_evals.checkpoint_fuzz import Subject, small_model
from dite_evals.checkpoint_mutants import KINDS
from tests.text.pipelines import PIPELINES

CASES, DEEP = 10_000, 0.1  # of the 200,000 of `python evals/checkpoint_fuzz.py`, the first

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc"),
    pytest.mark.timeout(900, method="thread"),  # each case has an alarm of its own, which would take the place of the other method's
]


@pytest.fixture
def subject(tmp_path):
    tmpfs = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=tmpfs if tmpfs.is_dir() else tmp_path) as folder:
        yield Subject(small_model(Path(folder) / "saved"), Path(folder) / "q")


def check(found, cases):
    assert found.failures == []
    assert found.total() == cases and found.total("refused") > 0.9 * cases
    assert {kind for _, kind, _ in found.counts} == set(KINDS)
    assert not any(seal == "sealed" and outcome == "other" for seal, _, outcome in found.counts)
    assert found.total("same") and found.total("other"), "the cases are too rough to reach the end of a load"


def test_ten_thousand_spoilt_models_crash_nothing_hang_nothing_and_are_never_silently_wrong(subject):
    check(subject.run(range(CASES), DEEP), CASES)


def test_a_case_is_the_same_whenever_it_is_run(subject):
    assert subject.run(range(300, 340), 0.5).counts == subject.run(range(300, 340), 0.5).counts


def test_a_loader_that_believed_everything_would_be_found_out(subject, monkeypatch):
    monkeypatch.setattr("dite.checkpoint.load.check_folder", lambda folder: True)
    outcomes = {failure["outcome"] for failure in subject.run(range(200), 0.0).failures}
    assert "silently wrong" in outcomes


def test_a_loader_that_raises_whatever_it_likes_would_be_found_out(subject, monkeypatch):
    monkeypatch.setattr(dite, "load", lambda folder: {}["no"])
    assert {failure["outcome"] for failure in subject.run(range(3), 0.0).failures} == {"other exception"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 loads quantized models in another way")
    folder = tmp_path_factory.mktemp("text")
    pipe = PIPELINES["pixart"]()
    dite.quantize(pipe, "w4a8", effort="fast", overrides=["text_encoders.num_bits=8"])
    return Subject(dite.save(pipe, folder / "saved"), folder / "q")


def test_spoilt_text_pipelines_are_refused_or_what_their_files_say(text):
    found = text.run(range(60), 1.0)
    assert found.failures == [] and found.total("refused") > 30 and found.total("other") + found.total("same") > 3


def forgets_words(pipe):
    vocabulary = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"] = vocabulary["model"]["vocab"][:3]
    pipe.tokenizer._tokenizer = pipe.tokenizer.backend_tokenizer.from_str(json.dumps(vocabulary))


def other_norms(pipe):
    pipe.text_encoder.encoder.final_layer_norm.variance_epsilon = 0.5


FRAUDS = {
    "a tokenizer without words": forgets_words,
    "another scheduler": lambda pipe: pipe.scheduler.register_to_config(beta_end=0.5),
    "no text encoder": lambda pipe: pipe.register_modules(text_encoder=None),
    "a norm that was lost": lambda pipe: torch.nn.init.ones_(pipe.text_encoder.encoder.final_layer_norm.weight),
}


@pytest.mark.parametrize("fraud", [*FRAUDS.values()], ids=FRAUDS)
@pytest.mark.parametrize("seal", ["resealed", "unsealed", "sealed"])
def test_a_text_pipeline_that_is_not_what_its_files_say_is_found_out(text, monkeypatch, fraud, seal):
    load = dite.load
    monkeypatch.setattr(dite, "load", lambda folder: (pipe := load(folder), fraud(pipe))[0])
    assert text._case({}, seal)[0] == "silently wrong"


def test_under_its_manifest_a_text_encoder_that_computes_something_else_is_found_out(text, monkeypatch):
    load = dite.load
    monkeypatch.setattr(dite, "load", lambda folder: (pipe := load(folder), other_norms(pipe))[0])
    assert text._case({}, "sealed")[0] == "silently wrong"


def test_the_folder_is_mended_after_each_case(subject):
    before = {path.name: path.read_bytes() for path in subject.folder.iterdir()}
    subject.run(range(100), 0.5)
    assert {path.name: path.read_bytes() for path in subject.folder.iterdir()} == before
    shutil.rmtree(subject.folder)
