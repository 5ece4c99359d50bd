"""Interrupt `dite.save` at each point where it touches the disk: kill it there, or let the disk be full there.

Points are found by running it once and counting: a folder or a file that is made, a file's second half, a flush to disk, a rename, an exchange, a
removal. Each trial is a forked process, so that nothing has to be imported again, and a kill is a real SIGKILL.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dite
from dite.errors import DiteError

SECONDS = 120  # a trial takes less than one
WRITES = os.O_WRONLY | os.O_RDWR
HOOKED = {"os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir"}


class Points:
    """Calls `act(index, what, path)` at every point of what runs inside `counting`."""

    def __init__(self, folder: Path, act: Callable[[int, str, str], None]):
        self.folder, self.act = str(folder), act
        self.count, self.on, self.installed = 0, False, False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Only what lies in the folder counts."""
        import safetensors.torch

        sync, save_file = os.fsync, safetensors.torch.save_file

        def synced(descriptor: int) -> None:
            self._reach("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            sync(descriptor)

        def saved(tensors: Any, file: Any, *arguments: Any, **keywords: Any) -> None:  # the library writes without telling Python
            self._reach("open", str(file))
            save_file(tensors, file, *arguments, **keywords)
            whole = Path(file).read_bytes()
            Path(file).write_bytes(whole[: len(whole) // 2])
            self._reach("half of a file", str(file))
            Path(file).write_bytes(whole)

        if not self.installed:
            sys.addaudithook(self._hook)
            self.installed = True
        with ExitStack() as stack:
            stack.enter_context(patch("os.fsync", synced))
            stack.enter_context(patch("safetensors.torch.save_file", saved))
            stack.enter_context(patch("dite.checkpoint.swap.exchange", self._around(_exchange())))
            self.on = True
            try:
                yield
            finally:
                self.on = False

    def _around(self, exchange: Callable) -> Callable:
        def exchanged(one: Path, other: Path) -> bool:
            self._reach("before the exchange", str(other))
            done = exchange(one, other)
            self._reach("after the exchange", str(other))
            return done

        return exchanged

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._reach("open", arguments[0])
        elif event in HOOKED:
            self._reach(event, os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "")

    def _reach(self, what: str, path: str) -> None:
        if self.on and path.startswith(self.folder):
            self.on = False  # what an action does is no point
            try:
                self.act(self.count, what, path)
            finally:
                self.count += 1
                self.on = True


def points_of(save: Callable[[], Any], folder: Path) -> list[str]:
    """What each point of `save()` is, in order; carried out in a forked process."""
    log = folder / "points.log"

    def note(_index: int, what: str, path: str) -> None:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{what} {Path(path).name}\n")

    status, said = forked(lambda: _run(save, Points(folder, note)))
    found = log.read_text(encoding="utf-8").splitlines()
    log.unlink()
    if status:
        raise RuntimeError(f"the save that should count points failed: {said}")
    return found


def killed_at(save: Callable[[], Any], folder: Path, point: int) -> bool:
    """Kill `save()` at a point; whether it came to that."""

    def kill(index: int, _what: str, _path: str) -> None:
        if index == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return forked(lambda: _run(save, Points(folder, kill)))[0] == -signal.SIGKILL


def full_at(save: Callable[[], Any], folder: Path, point: int) -> tuple[int, str]:
    """Let the disk be full from a point on; exit status (0: saved, 3: refused by a DiteError, 4: another exception) and what was said."""

    def fail(index: int, what: str, path: str) -> None:
        if index >= point and not what.startswith(("os.remove", "os.rmdir", "os.chmod", "os.rename", "before", "after")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return forked(lambda: _run(save, Points(folder, fail)))


def forked(work: Callable[[], Any]) -> tuple[int, str]:
    """Run `work` in a forked process; its exit status (negative: the signal that ended it), and what the exception said that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        status, said = 0, ""
        try:
            signal.alarm(SECONDS)
            work()
        except DiteError as error:
            status, said = 3, str(error)
        except BaseException as error:
            status, said = 4, repr(error)
        os.write(write, said.encode()[:4000])
        os._exit(status)
    os.close(write)
    with open(read, encoding="utf-8") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def contents(folder: Path) -> dict[str, str] | None:
    """The digest of every file of a folder; None where there is no folder."""
    if not folder.exists():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def race(model: Any, folder: Path, runs: int) -> list[tuple[int, str]]:
    """Save to one folder from several processes at the same moment; how each ended."""
    start_read, start_write = os.pipe()
    results = []
    for _ in range(runs):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(start_write)
            os.read(start_read, 1)  # until the parent closes its end
            status, said = forked(lambda: dite.save(model, folder))
            os.write(write, said.encode()[:4000])
            os._exit(status if status >= 0 else 99)
        os.close(write)
        results.append((child, read))
    os.close(start_read)
    os.close(start_write)
    ended = []
    for child, read in results:
        with open(read, encoding="utf-8") as stream:
            said = stream.read()
        ended.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said))
    return ended


def _run(save: Callable[[], Any], points: Points) -> None:
    with points.counting():
        save()


def _exchange() -> Callable:
    from importlib import import_module

    return import_module("dite.checkpoint.swap").exchange
