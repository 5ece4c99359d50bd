"""Spoilt at random, ten thousand times: a saved model is refused, or is the original, or is exactly what its new files say."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import dite
from dite_evals.checkpoint_fuzz import Subject, small_model
from dite_evals.checkpoint_mutants import KINDS

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


def test_the_folder_is_mended_after_each_case(subject):
    before = {path.name: path.read_bytes() for path in subject.folder.iterdir()}
    subject.run(range(100), 0.5)
    assert {path.name: path.read_bytes() for path in subject.folder.iterdir()} == before
    shutil.rmtree(subject.folder)
