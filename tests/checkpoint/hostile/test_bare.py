"""What lies beside a bare model under a hidden name: pathlib's glob finds such files, and no manifest used to list them."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

import dite
from dite.checkpoint.format import MANIFEST
from dite.errors import CheckpointError
from dite.models.load import load_pipeline, stored_dtype
from tests.checkpoint.hostile.spoil import reseal, split
from tests.checkpoint.hostile.watch import deadline, unopened

WEIGHTS = "diffusion_pytorch_model.safetensors"
SECONDS = 30

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches by inotify")


@pytest.fixture(scope="module")
def saved(make_tiny_pipeline, tmp_path_factory):
    return dite.save(make_tiny_pipeline().transformer, tmp_path_factory.mktemp("bare") / "saved")


@pytest.fixture
def folder(saved, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.safetensors").write_bytes((saved / WEIGHTS).read_bytes())
    (tmp_path / "outside" / "secret.json").write_text(json.dumps({"weight_map": {}}))
    return shutil.copytree(saved, tmp_path / "q")


def index_of_others(folder):
    """An index that a check would believe in, of weights that no loader reads."""
    save_file({"x": torch.ones(1)}, folder / ".other.safetensors")
    (folder / ".a.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": ".other.safetensors"}}))


HIDDEN = {
    "a pipe as index": lambda folder: os.mkfifo(folder / ".a.safetensors.index.json"),
    "a pipe as weights": lambda folder: os.mkfifo(folder / ".a.safetensors"),
    "an index that is a link": lambda folder: (folder / ".a.safetensors.index.json").symlink_to(folder.parent / "outside" / "secret.json"),
    "weights that are a link": lambda folder: (folder / ".a.safetensors").symlink_to(folder.parent / "outside" / "secret.safetensors"),
    "an index": index_of_others,
    "weights in capitals": lambda folder: (folder / ".A.SAFETENSORS").write_bytes(b""),
    "a pickle": lambda folder: (folder / ".a.bin").write_bytes(b""),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("load", [dite.load, load_pipeline])
def test_a_hidden_file_that_a_loader_could_read_is_refused_beside_a_sealed_model(name, load, folder):
    HIDDEN[name](folder)
    with deadline(SECONDS), unopened(folder.parent / "outside"), pytest.raises(CheckpointError, match=r"^\..* is not in the manifest"):
        load(folder)


@pytest.mark.parametrize("name", ["a pipe as index", "a pipe as weights", "an index that is a link", "weights that are a link"])
def test_a_hidden_pipe_or_link_is_refused_without_a_manifest(name, folder):
    (folder / MANIFEST).unlink()
    HIDDEN[name](folder)
    with deadline(SECONDS), unopened(folder.parent / "outside"), pytest.raises(CheckpointError, match=r"^\.a.*(is a link|not a regular file)"):
        dite.load(folder)


def test_a_hidden_index_decides_nothing_without_a_manifest(folder):
    expected = {name: tensor.clone() for name, tensor in dite.load(folder).state_dict().items()}
    (folder / MANIFEST).unlink()
    index_of_others(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dite.load(folder).state_dict().items())


@pytest.mark.parametrize("name", HIDDEN)
def test_the_dtype_is_read_off_no_hidden_file(name, folder):
    HIDDEN[name](folder)
    with deadline(SECONDS), unopened(folder.parent / "outside"):
        assert stored_dtype(folder) == torch.float32


def test_a_shard_with_a_hidden_name_is_refused_even_if_the_manifest_lists_it(folder):
    (folder / WEIGHTS).rename(folder / ".a.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": ".a.safetensors"}}))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"points at '.a.safetensors'"):
        dite.load(folder)


def test_an_index_that_no_loader_asks_for_does_not_stand_in_for_the_weights(folder):
    """Otherwise what is checked would not be what is loaded."""
    (folder / MANIFEST).unlink()
    (folder / WEIGHTS).rename(folder / "sound.safetensors")
    (folder / WEIGHTS).write_bytes(b"not a header")
    names = dict.fromkeys(split(folder / "sound.safetensors")[0].keys() - {"__metadata__"}, "sound.safetensors")
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a sound safetensors file"):
        dite.load(folder)


@pytest.mark.parametrize("name", [".gitattributes", ".DS_Store", ".cache/huggingface/download/config.json", ".git/HEAD"])
def test_hidden_files_that_no_loader_reads_may_lie_beside_a_sealed_model(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("")
    dite.load(folder)
