"""Real processes for the tests: `run` starts them on a scenario of scenarios.py and returns what each rank wrote.

Ranks are forked from one process that has imported everything, so that a test doesn't pay for torch once a rank.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STARTED_S = 150.0  # imports, on a machine that has more to do


@cache
def nursery() -> subprocess.Popen:
    """The process that forks ranks: a line of JSON in, their process ids out."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "evals"), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, str(HERE / "scenarios.py")], env=environment, **pipes)
    atexit.register(process.kill)
    return process


class Ranks:
    """Processes that run one scenario; each writes JSON to a file of its own."""

    def __init__(self, world: int, scenario: str, settings: dict, timeout_s: float = 150.0):
        self.folder = tempfile.TemporaryDirectory()
        self.deadline = time.monotonic() + timeout_s
        process = nursery()
        process.stdin.write(json.dumps([world, scenario, settings, self.folder.name]) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], STARTED_S)[0]:
            nursery.cache_clear()
            process.kill()
            raise AssertionError(f"no ranks were started within {STARTED_S:.0f} s")
        self.pids = json.loads(process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in range(len(self.pids)):
            self.signal(rank, signal.SIGKILL)
        while any(map(self.lives, range(len(self.pids)))) and time.monotonic() < self.deadline + 10:
            time.sleep(0.01)
        self.folder.cleanup()

    def lives(self, rank: int) -> bool:
        try:
            os.kill(self.pids[rank], 0)
        except ProcessLookupError:
            return False
        return True

    def signal(self, rank: int, number: int) -> None:
        if self.lives(rank):
            os.kill(self.pids[rank], number)

    def log(self, rank: int) -> str:
        return (Path(self.folder.name) / f"{rank}.log").read_text()

    def answer(self, rank: int):
        """What the rank wrote, once it has ended."""
        path = Path(self.folder.name) / f"{rank}.json"
        while not path.exists():
            assert self.lives(rank) or path.exists(), f"rank {rank} ended without an answer:\n{self.log(rank)[-3000:]}"
            assert time.monotonic() < self.deadline, f"rank {rank} is still at it:\n{self.log(rank)[-3000:]}"
            time.sleep(0.01)
        return json.loads(path.read_text())

    def wait_for(self, name: str, timeout_s: float = 60.0) -> None:
        """Until a scenario has made the file `name` beside its answer."""
        until = time.monotonic() + timeout_s
        while not (Path(self.folder.name) / name).exists():
            assert time.monotonic() < until, f"{name} never came:\n{self.log(0)[-2000:]}"
            time.sleep(0.01)


def run(world: int, scenario: str, timeout_s: float = 150.0, **settings):
    """Every rank's answer."""
    with Ranks(world, scenario, settings, timeout_s) as ranks:
        return [ranks.answer(rank) for rank in range(world)]
