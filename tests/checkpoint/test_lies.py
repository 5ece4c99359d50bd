"""A lie about any field of any configuration is refused, or changes nothing, although the manifest is made anew after it."""

import pytest

import dite
from dite_evals.checkpoint_lies import Liar

QUICK = ["dite_manifest.json", "model_index.json", "transformer/config.json"]
ALL = [*QUICK, "vae/config.json", "scheduler/scheduler_config.json"]
# Fields that tell how a model was made or who wrote it: what is loaded is the same to the last bit.
INFORMS = ("quantization_config.recipe", "quantization_config.skipped.", "id2label", "dropout", "shift_factor")


@pytest.fixture(scope="module")
def liar(make_tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lies")
    pipe = make_tiny_pipeline()
    dite.quantize(pipe, "w4a8", effort="fast")
    dite.save(pipe, folder / "saved")
    return Liar(folder / "saved", folder / "q")


def told(liar, names, every=1):
    cases = list(liar.cases(names))[::every]
    return [(name, ".".join(map(str, path)), what, *liar.tell(name, path, lie)) for name, path, what, lie in cases]


@pytest.mark.timeout(900)
def test_three_hundred_lies_are_refused_or_change_nothing(liar):
    answers = told(liar, QUICK, every=2)
    assert len(answers) >= 300
    assert [answer for answer in answers if answer[3] not in ("refused", "same")] == []
    harmless = {field for _, field, _, outcome, _ in answers if outcome == "same"}
    assert {field for field in harmless if not field.startswith(INFORMS)} == set()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_lie_about_every_field_is_refused_or_changes_nothing(liar):
    answers = told(liar, ALL)
    assert [answer for answer in answers if answer[3] not in ("refused", "same")] == []
    assert sum(answer[3] == "refused" for answer in answers) >= 1000


def test_every_lie_about_the_manifest_is_refused_by_its_name(liar):
    answers = told(liar, ["dite_manifest.json"], every=3)
    assert {answer[3] for answer in answers} == {"refused"}


def test_a_loader_that_believed_everything_would_be_found_out(liar, monkeypatch):
    monkeypatch.setattr("dite.checkpoint.structure.check_fields", lambda *_: None)
    assert liar.tell("scheduler/scheduler_config.json", ("beta_end",), 0)[0] == "other"


def test_a_loader_that_made_up_what_is_missing_would_be_found_out(liar, monkeypatch):
    monkeypatch.setattr("dite.checkpoint.structure.check_fields", lambda *_: None)
    assert liar.tell("scheduler/scheduler_config.json", ("beta_end",), 0.5)[0] == "other"
    assert liar.tell("scheduler/scheduler_config.json", ("clip_sample",), ...)[0] == "other"
