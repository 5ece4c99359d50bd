"""Starting the ranks of `--nproc N`: this command again, N times, meeting through a file and listening on loopback only."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from dite.errors import RankLost, UsageError

GRACE_S = 10.0  # for the others to say their own error and end, once one has failed
POLL_S = 0.05
TAIL_BYTES = 2000
RENDEZVOUS = "DITE_RENDEZVOUS"


@contextmanager
def keeping_stdout() -> Iterator[None]:
    """For the time in which ranks meet: gloo of torch 2.8 says on stdout who is connected, where an answer's JSON belongs. It goes to stderr.

    It is the whole process's stdout, so one thread at a time may do this.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is none
        yield
        return
    try:
        with suppress(OSError):  # no stderr
            os.dup2(2, 1)
        yield
    finally:
        try:
            if sys.platform != "win32":
                ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def environment_ranks() -> tuple[int, int] | None:
    """(rank, world size) that --nproc or torchrun gave this process; None for a process that was started alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    given = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not all(text.isascii() and text.isdigit() for text in given) or not int(given[0]) < int(given[1]):
        rule = "they are numbers from 0, the first less than the second"
        raise UsageError(f"RANK {given[0]!r} of WORLD_SIZE {given[1]!r} can't be", rule, "unset both, or start with --nproc or torchrun")
    return int(given[0]), int(given[1])


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `dite ARGUMENTS` as `count` ranks and return the exit code of rank 0, which alone prints.

    When one fails, the others get GRACE_S to end by themselves. Raises RankLost when rank 0 could not say what happened.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dite_ranks_")))
        logs = [stack.enter_context((folder / f"rank{rank}.log").open("wb+")) for rank in range(count)]
        ranks: list[subprocess.Popen] = []
        stack.callback(_end, ranks)
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminated))
        for rank in range(count):
            ranks.append(_start(rank, count, arguments, folder, logs[rank]))
        try:
            codes = _watch(ranks)
        except KeyboardInterrupt:  # the terminal has told the ranks as well
            codes = _ended(ranks, time.monotonic() + GRACE_S)
        if codes[0] is not None and codes[0] >= 0:
            odd = next((rank for rank, code in enumerate(codes) if code not in (0, codes[0])), None)
            if odd is not None:  # what all ranks refuse alike is said once
                print(f"rank {odd} ended with {_status(codes[odd])}\n{_tail(logs[odd])}".strip(), file=sys.stderr)
            return codes[0]
        rank = next((rank for rank, code in enumerate(codes) if code not in (0, None)), 0)
        raise RankLost(f"rank {rank} ended with {_status(codes[rank])}", _tail(logs[rank]) or "it said nothing", "run the command again")


def threads_per_rank(count: int) -> int:
    """Cores shared out evenly."""
    return max(1, (os.cpu_count() or 1) // count)


def _start(rank: int, count: int, arguments: Sequence[str], folder: Path, log: IO[bytes]) -> subprocess.Popen:
    environment = {"OMP_NUM_THREADS": str(threads_per_rank(count))} | os.environ
    environment |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        RENDEZVOUS: str(folder / "ranks"),
    }
    command = [sys.executable, "-P", "-m", "dite", *arguments]
    if rank:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
    return subprocess.Popen(command, env=environment)


def _watch(ranks: list[subprocess.Popen]) -> list[int | None]:
    """Exit codes; None for a rank that had to be killed after another had failed."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return codes
        if any(codes):  # neither running nor well
            return _ended(ranks, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)


def _ended(ranks: list[subprocess.Popen], deadline: float) -> list[int | None]:
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return [rank.poll() for rank in ranks]


def _end(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


def _terminated(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # unwinds, so that no rank is left behind


def _status(code: int | None) -> str:
    if code is None:
        return f"no answer within {GRACE_S:.0f} s"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL_BYTES))
    return log.read().decode(errors="replace").strip()
