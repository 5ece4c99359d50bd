"""One run at a time writes an output. The lock is the kernel's (flock) on a file beside the output, so that it goes with its process, however that
ends; the file says who holds it, for whoever is refused.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dite.errors import OutputInUse

PATIENCE_S = 2.0  # who has just taken the lock has yet to write down who it is

try:
    import fcntl
except ImportError:  # where files can't be locked, nothing is
    fcntl = None


class OutputLock:
    """Held from `with` to its end. Raises OutputInUse, which names the holder, when another run has it."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        self.path = self.folder.parent / f".{self.folder.name}.lock"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether nobody else can be writing: false also where nothing can be locked."""
        return self._descriptor is not None

    def __enter__(self) -> "OutputLock":
        while fcntl is not None and not self.held:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_named(descriptor):
                    os.ftruncate(descriptor, 0)
                    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
                    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
                    self._descriptor, descriptor = descriptor, None
            except BlockingIOError:
                raise self._refusal(descriptor) from None
            except OSError:  # a file system without locks, or a full one: the lock is not worth failing for
                self.path.unlink(missing_ok=True)
                return self
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        return self

    def __exit__(self, *_exception: Any) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)  # before it is unlocked: who comes in between finds its file without a name, and tries again
            os.close(self._descriptor)
            self._descriptor = None

    def _is_named(self, descriptor: int) -> bool:
        """Whether the locked file is still the one at `path`: its last holder removes it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self, descriptor: int) -> OutputInUse:
        who, patience = "another process is writing it", time.monotonic() + PATIENCE_S
        while time.monotonic() < patience:
            try:
                holder = json.loads(os.pread(descriptor, 1000, 0))
                who = f"process {holder['pid']} on {holder['host']} has been writing it since {holder['since']}"
                break
            except (ValueError, KeyError, TypeError):
                time.sleep(0.01)
        return OutputInUse(f"{self.folder} is in use", who, "wait for it, or choose another -o")
