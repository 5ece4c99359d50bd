"""Replace a folder by another one, so that at no moment there is neither.

A rename can't replace a folder that holds something. Linux (renameat2) and macOS (renamex_np) can exchange two names in one step; elsewhere the old
folder is moved aside first, and whoever is killed in between leaves it there: `recover` puts it back.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def replace_folder(new: Path, folder: Path) -> None:
    """Move `new` to `folder`, on the same file system; what was there is removed, or still there if this fails."""
    if not os.path.lexists(folder):
        os.rename(new, folder)
        _sync_or(folder.parent, lambda: os.rename(folder, new))
    elif exchange(new, folder):
        _sync_or(folder.parent, lambda: exchange(new, folder))
        shutil.rmtree(new, ignore_errors=True)
    else:
        _step_aside(new, folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system can't."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, RENAME_SWAP)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def recover(folder: Path) -> None:
    """Undo what a killed run left beside `folder`: put back an old folder that was moved aside, remove what was never finished.

    Only for who holds the output's lock.
    """
    aside = sorted(folder.parent.glob(f".{_literal(folder.name)}.replaced-*"))
    if aside and not os.path.lexists(folder):
        os.rename(aside.pop(), folder)
    for path in (*aside, *folder.parent.glob(f".{_literal(folder.name)}.partial-*")):
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_or(place: Path, undo: Callable[[], object]) -> None:
    try:
        sync(place)
    except OSError:
        undo()
        raise


def _step_aside(new: Path, folder: Path) -> None:
    aside = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
