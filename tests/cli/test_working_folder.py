"""A folder that was downloaded may hold a `torch.py` or a `dite.py`: no process that dite starts runs what lies in the current folder."""

import asyncio
import os
import subprocess
import sys

import pytest
import torch

from dite.parallel.launch import start_ranks
from dite.server.ranks import Ranks, RanksLost
from dite.server.settings import ServerSettings


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """`trap("torch")` lays a torch.py in what is now the current folder, and gives the file that appears when it is run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path and os.path.isabs(path)))

    def lay(module):
        folder, sprung = tmp_path / "download", tmp_path / "sprung"
        folder.mkdir()
        (folder / f"{module}.py").write_text(f"open({str(sprung)!r}, 'w').close()\n")
        monkeypatch.chdir(folder)
        return sprung

    return lay


def test_converting_runs_nothing_that_lies_beside_the_checkpoint(trap):
    sprung = trap("torch")
    torch.save({"w": torch.ones(2)}, "x.pt")
    command = [sys.executable, "-P", "-m", "dite", "convert", "x.pt", "-o", "x.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not sprung.exists() and os.path.isfile("x.safetensors")


def test_the_ranks_of_a_command_run_nothing_in_the_current_folder(trap):
    sprung = trap("dite")
    assert start_ranks(2, ["--version"]) == 0
    assert not sprung.exists()


def test_the_ranks_of_a_server_run_nothing_in_the_current_folder(trap, tmp_path):
    sprung = trap("dite")

    async def story():
        ranks = Ranks(ServerSettings(model=str(tmp_path / "no-model"), startup_timeout_s=120), lambda *_: None)
        try:
            with pytest.raises(RanksLost) as lost:
                await ranks.start()
        finally:
            await ranks.kill()
        return str(lost.value)

    assert "no-model" in asyncio.run(story())
    assert not sprung.exists()
