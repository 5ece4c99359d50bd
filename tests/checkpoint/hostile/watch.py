"""What a piece of code opens, and how much memory it may take.

Python's audit hook sees what Python opens; inotify also sees the safetensors library, which opens files without asking Python. A hook can't be
removed: it is installed once and switched.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN, IN_NONBLOCK, EVENT = 0x20, 0o4000, struct.Struct("iIII")
LIBRARIES = tuple(sorted({sys.prefix, sys.base_prefix, *(path for path in sys.path if path), str(Path(__file__).resolve().parents[3])}))


class Watch:
    """An audit hook on `open` that writes down paths while it is on."""

    def __init__(self) -> None:
        self.on, self.opened = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes):
            self.opened.append(os.path.abspath(os.fsdecode(arguments[0])))

    def outside(self, folder: Path) -> list[str]:
        """What was opened that is neither in `folder` nor a library's own file."""
        return [path for path in self.opened if not path.startswith((str(folder) + "/", *LIBRARIES, "/proc/", "/sys/"))]

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.opened, self.on = [], True
        try:
            yield
        finally:
            self.on = False


@contextmanager
def unopened(folder: Path) -> Iterator[None]:
    """Fail if any process opens anything in `folder` meanwhile, in whatever way."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(IN_NONBLOCK)
    assert descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(folder), IN_OPEN) >= 0
    try:
        yield
        try:
            events = os.read(descriptor, 65536)
        except BlockingIOError:
            events = b""
        assert events == b"", f"opened in {folder}: {events!r}"
    finally:
        os.close(descriptor)


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Let this process map at most so much more than it has: what goes beyond fails in whoever asks for it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """TimeoutError in the midst of whatever hangs."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
