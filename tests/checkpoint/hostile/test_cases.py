"""Every hostile or broken folder is refused: by file and field, in time, with nothing opened outside, and nothing allocated that it only claims."""

import shutil
import sys

import pytest

import dite
from dite.errors import CheckpointError
from dite.models.load import load_pipeline
from tests.checkpoint.hostile.cases import CASES, reseal, spoiled
from tests.checkpoint.hostile.watch import Watch, deadline, memory_limit, unopened

MEMORY = 256 * 2**20  # a header of 200,000 tensors alone is some 150 MB of Python objects
SECONDS = 30  # the slowest takes 2 on an idle core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches by inotify")


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def saved(make_tiny_pipeline, tmp_path_factory):
    pipe = make_tiny_pipeline()
    dite.quantize(pipe, "w4a8", effort="fast")
    folder = dite.save(pipe, tmp_path_factory.mktemp("hostile") / "saved")
    dite.load(folder)  # so that no case is the first to import something
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.safetensors").write_bytes(b"secret")
    return shutil.copytree(saved, tmp_path / "q")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder_is_refused_by_file_and_field_and_touches_nothing(name, folder, watch):
    case = spoiled(name, folder)
    with (
        deadline(SECONDS),
        unopened(folder.parent / "outside"),
        memory_limit(MEMORY),
        watch.watching(),
        pytest.raises(CheckpointError) as caught,
    ):
        dite.load(folder)
    told = str(caught.value)
    assert case.file in told and case.word in told and caught.value.hint, told
    assert watch.outside(folder) == []


@pytest.mark.parametrize("name", ["a link out of the folder", "a manifest that is a named pipe", "a configuration with 1e999", "2^24 layers"])
def test_the_command_line_s_way_in_refuses_it_as_well(name, folder, watch):
    spoiled(name, folder)
    with deadline(SECONDS), unopened(folder.parent / "outside"), memory_limit(MEMORY), pytest.raises(CheckpointError):
        load_pipeline(folder)


def test_there_are_cases_of_more_than_forty_kinds():
    assert len(CASES) >= 40 and len({(case.file, case.word) for case in CASES.values()}) >= 40


def test_the_watch_sees_what_is_opened_outside(watch, tmp_path):
    (tmp_path / "x").write_text("")
    with watch.watching():
        (tmp_path / "x").read_text()
    assert watch.outside(tmp_path / "q") == [str(tmp_path / "x")]
    with pytest.raises(AssertionError, match="opened in"), unopened(tmp_path):
        (tmp_path / "x").read_text()


def test_the_memory_limit_limits(folder):
    import torch

    with memory_limit(MEMORY), pytest.raises(RuntimeError):
        torch.empty(2**29, dtype=torch.float32)


def test_a_new_manifest_that_agrees_loads(folder):
    reseal(folder)
    dite.load(folder)


def test_a_snapshot_of_the_hub_s_cache_consists_of_links_and_loads(saved, tmp_path):
    """Without a manifest: that is what the guarantees need."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for index, path in enumerate(sorted(path for path in saved.rglob("*") if path.is_file() and path.name != "dite_manifest.json")):
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / f"{index:040x}")
        link.symlink_to(blobs / f"{index:040x}")
    dite.load(snapshot)
