"""Real processes for the tests: `run` starts them on a scenario of scenarios.py and returns what each rank wrote."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Ranks:
    """Processes that run one scenario; each writes JSON to a file of its own."""

    def __init__(self, world: int, scenario: str, settings: dict, timeout_s: float = 150.0):
        self.folder = tempfile.TemporaryDirectory()
        self.deadline = time.monotonic() + timeout_s
        path = Path(self.folder.name)
        shared = os.environ | {"WORLD_SIZE": str(world), "DITE_RENDEZVOUS": str(path / "ranks"), "OMP_NUM_THREADS": "1"}
        shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "evals"), os.environ.get("PYTHONPATH", "")])
        self.processes = []
        for rank in range(world):
            command = [sys.executable, str(HERE / "scenarios.py"), scenario, json.dumps(settings), str(path / f"{rank}.json")]
            log = (path / f"{rank}.log").open("w")
            self.processes.append(subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=log, stderr=log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()

    def log(self, rank: int) -> str:
        return (Path(self.folder.name) / f"{rank}.log").read_text()

    def answer(self, rank: int):
        """What the rank wrote, once it has ended."""
        self.processes[rank].wait(max(0.1, self.deadline - time.monotonic()))
        path = Path(self.folder.name) / f"{rank}.json"
        assert path.exists(), f"rank {rank} ended with {self.processes[rank].returncode}:\n{self.log(rank)[-3000:]}"
        return json.loads(path.read_text())

    def wait_for(self, name: str, timeout_s: float = 60.0) -> None:
        """Until a scenario has made the file `name` beside its answer."""
        until = time.monotonic() + timeout_s
        while not (Path(self.folder.name) / name).exists():
            assert time.monotonic() < until, f"{name} never came:\n{self.log(0)[-2000:]}"
            time.sleep(0.01)


def run(world: int, scenario: str, **settings):
    """Every rank's answer."""
    with Ranks(world, scenario, settings) as ranks:
        return [ranks.answer(rank) for rank in range(world)]
