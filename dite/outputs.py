"""Where results may be written: asked before any work is done, so that none is lost at its end; by one run at a time; and whole or not at all."""

import errno
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from dite.errors import DiteError, OutputInUse, UsageError

PATIENCE_S = 2.0  # who has just taken the lock has yet to write down who it is
MODEL_FILES = ("dite_manifest.json", "model_index.json")

try:
    import fcntl
except ImportError:  # where files can't be locked, nothing is
    fcntl = None


def check_writable(folder: str | Path) -> None:
    """Raise UsageError unless `folder` could be written now: its nearest existing parent is a folder that takes new files.

    A folder inside a saved model is refused too: files that its manifest doesn't list would make the model unloadable.
    """
    folder = Path(folder).absolute()
    model = next((place for place in (folder, *folder.parents) if any((place / name).is_file() for name in MODEL_FILES)), None)
    if model is not None:
        raise UsageError(f"{folder} is {'' if model == folder else 'inside '}a model", "other files would make it unloadable", "choose another -o")
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise UsageError(f"{existing} is not a folder", f"{folder} is to be a folder", "choose another -o")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        if error.errno == errno.ENOSPC:  # who writes knows how many bytes are needed, and says so
            return
        raise UsageError(f"can't write to {existing}", error.strerror or str(error), "choose another -o, or change its permissions") from error


def write_file(path: Path, data: bytes) -> None:
    """Write atomically, the folder too where there is none. Raises DiteError that says how many bytes had no place; what was there before stays."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        why = f"{error.strerror or error}; it takes {len(data)} bytes"
        raise DiteError(f"can't write {path}", why, "make room and run the same command again: what was finished is kept") from error


class OutputLock:
    """Held from `with` to its end. Raises OutputInUse, which names the holder, when another run has it.

    The lock is the kernel's (flock) on a file beside the output, so that it goes with its process, however that ends; the file says who holds it.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        self.path = self.folder.parent / f".{self.folder.name}.lock"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether nobody else can be writing: false also where nothing can be locked."""
        return self._descriptor is not None

    def __enter__(self) -> "OutputLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
