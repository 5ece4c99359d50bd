"""Saving is interrupted, the disk is full, runs collide: what was there stays whole, and what went wrong is said."""

import os
import shutil
import socket
import sys

import pytest
import torch

import dite
from dite.checkpoint.swap import exchange, recover, replace_folder
from dite.errors import CheckpointError, OutputInUse
from dite.outputs import OutputLock
from dite_evals.save_faults import contents, forked, full_at, killed_at, points_of, race

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def old(make_tiny_pipeline):
    return make_tiny_pipeline()


@pytest.fixture(scope="module")
def new(make_tiny_pipeline):
    pipe = make_tiny_pipeline()
    dite.quantize(pipe, "w4a8", effort="fast")
    return pipe


@pytest.fixture
def save(new, tmp_path):
    return lambda: dite.save(new, tmp_path / "work" / "q", overwrite=True)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("replacing", [False, True])
def test_a_save_killed_anywhere_leaves_the_old_model_or_the_new_one_whole(old, new, save, place, tmp_path, replacing):
    before = contents(dite.save(old, place / "q")) if replacing else None
    after = contents(dite.save(new, tmp_path / "expected"))
    points = points_of(save, place)
    assert len(points) >= 40
    reached = [index for index, what in enumerate(points) if what.startswith(("before", "after", "os.rename"))]
    for point in sorted({*reached, *range(0, len(points), 9)}):
        dite.save(old, place / "q", overwrite=True)
        if not replacing:
            shutil.rmtree(place / "q")
        assert killed_at(save, place, point), points[point]
        assert contents(place / "q") in (before, after), points[point]
    save()
    assert contents(place / "q") == after and [path.name for path in place.iterdir()] == ["q"]


def test_a_disk_full_anywhere_is_said_with_the_bytes_needed_and_the_old_model_is_intact(old, save, place):
    before = contents(dite.save(old, place / "q"))
    points = points_of(save, place)
    dite.save(old, place / "q", overwrite=True)
    for point in [index for index, what in enumerate(points) if what.startswith(("open", "os.mkdir", "fsync", "half"))][::5]:
        status, said = full_at(save, place, point)
        assert (status, "bytes are needed" in said) == (3, True), (points[point], said)
        assert contents(place / "q") == before and [path.name for path in place.iterdir()] == ["q"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(new, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"\d+ bytes are needed, 1000 are free"):
        dite.save(new, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_of_several_runs_on_one_output_one_wins_and_the_others_are_told_who_holds_it(new, tmp_path):
    ended = race(new, tmp_path / "q", 3)
    assert sorted(status for status, _ in ended) == [0, 3, 3]
    assert all("has been writing it since" in said or "exists already" in said for status, said in ended if status)
    dite.load(tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_who_is_refused_reads_pid_and_host_of_the_holder(new, tmp_path):
    with OutputLock(tmp_path / "q"), pytest.raises(OutputInUse, match=f"process {os.getpid()} on {socket.gethostname()}"):
        dite.save(new, tmp_path / "q")
    dite.save(new, tmp_path / "q")


def test_the_lock_of_a_dead_run_is_no_obstacle(new, tmp_path):
    def die_holding_it():
        OutputLock(tmp_path / "q").__enter__()
        os.kill(os.getpid(), 9)

    assert forked(die_holding_it)[0] == -9
    assert (tmp_path / ".q.lock").exists()
    dite.save(new, tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_caller_who_holds_the_lock_saves_under_it(new, tmp_path):
    with OutputLock(tmp_path / "q") as lock:
        dite.save(new, tmp_path / "q", lock=lock)
        assert (tmp_path / ".q.lock").exists()


def test_where_names_cannot_be_exchanged_an_old_folder_moved_aside_comes_back(tmp_path, monkeypatch):
    (tmp_path / ".q.replaced-1").mkdir()
    (tmp_path / ".q.partial-1").mkdir()
    recover(tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    monkeypatch.setattr("dite.checkpoint.swap.exchange", lambda *_: False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").write_text("")
    replace_folder(tmp_path / "new", tmp_path / "q")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["q", "q/x"]


def test_two_folders_exchange_their_names_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
