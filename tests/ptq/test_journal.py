"""A journal keeps what was measured, whole lines only, and belongs to one run."""

import pytest
import torch

from dite.errors import ResumeConflict
from dite.ptq.calibrate import Calls
from dite.ptq.journal import FITNESS, Journal, read_calls, write_calls

HEADER = {"model": "a", "recipe": "b"}


def test_what_was_added_is_known_again(tmp_path):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.add("x", 0.1)
        journal.add("y", 1 / 3)
    with Journal(tmp_path / "j", HEADER) as journal:
        assert journal.known == {"x": 0.1, "y": 1 / 3}


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_cut_off_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path, cut):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.add("x", 0.1)
        journal.add("y", 0.2)
    path = tmp_path / "j" / FITNESS
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(tmp_path / "j", HEADER) as journal:
        known = dict(journal.known)
        assert known.keys() <= {"x", "y"}
        journal.add("z", 0.3)
    with Journal(tmp_path / "j", HEADER) as journal:
        assert journal.known == {**known, "z": 0.3}


@pytest.mark.parametrize("key", HEADER)
def test_the_journal_of_another_run_is_refused(tmp_path, key):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.add("x", 0.1)
    with pytest.raises(ResumeConflict, match=key):
        Journal(tmp_path / "j", {**HEADER, key: "other"})


def test_a_journal_in_which_nothing_was_done_is_anyones(tmp_path):
    Journal(tmp_path / "j", HEADER).__exit__()
    with Journal(tmp_path / "j", {**HEADER, "model": "other"}) as journal:
        journal.add("x", 0.1)
    with pytest.raises(ResumeConflict, match="model"):
        Journal(tmp_path / "j", HEADER)


def test_a_header_that_cannot_be_read_is_refused(tmp_path):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.add("x", 0.1)
    (tmp_path / "j" / "header.json").write_text("{")
    with pytest.raises(ResumeConflict):
        Journal(tmp_path / "j", HEADER)


def test_calls_come_back_as_they_were_however_deep(tmp_path):
    x = torch.randn(3, 4).T
    calls = {"transformer": Calls([{"a": x, "b": [x, (1, None)], "c": {"d": True, "e": "f"}}], [{"a": x.bfloat16()}])}
    write_calls(calls, tmp_path / "calls.safetensors")
    found = read_calls(tmp_path / "calls.safetensors")["transformer"]
    call = found.calibration[0]
    assert torch.equal(call["a"], x) and torch.equal(call["b"][0], x) and call["b"][1] == (1, None) and call["c"] == {"d": True, "e": "f"}
    assert found.held_out[0]["a"].dtype == torch.bfloat16


def test_calls_that_cannot_be_written_are_recorded_again(tmp_path):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.keep_calls({"transformer": Calls([{"a": object()}], [])})
        assert journal.calls() is None


def test_a_journal_in_use_is_refused(tmp_path):
    with Journal(tmp_path / "j", HEADER), pytest.raises(ResumeConflict, match="in use"):
        Journal(tmp_path / "j", HEADER)
    Journal(tmp_path / "j", HEADER).__exit__()


def test_calls_that_would_come_back_as_something_else_are_recorded_again(tmp_path):
    write_calls({"t": Calls([{"shape": torch.Size([1, 2])}], [])}, tmp_path / "calls.safetensors")
    assert not (tmp_path / "calls.safetensors").exists()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:20])])
def test_a_layer_comes_back_as_it_was_and_a_damaged_one_not_at_all(tmp_path, damage):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.keep_layer("t.a", {"x": torch.arange(6).view(2, 3).T}, {"error": None, "short": True})
        tensors, facts = journal.layer("t.a")
        assert torch.equal(tensors["x"], torch.arange(6).view(2, 3).T) and facts == {"error": None, "short": True}
        damage(tmp_path / "j" / "layers" / "t.a.safetensors")
        assert journal.layer("t.a") is None and journal.layer("t.b") is None


def test_a_journal_with_layers_and_no_calls_is_refused_to_another_run(tmp_path):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.keep_layer("t.a", {"x": torch.zeros(1)}, {})
    with pytest.raises(ResumeConflict, match="model"):
        Journal(tmp_path / "j", {**HEADER, "model": "other"})
