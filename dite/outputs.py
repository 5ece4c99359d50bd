"""Where results may be written: asked before any work is done, so that none is lost at its end."""

import errno
import os
import tempfile
from pathlib import Path

from dite.errors import UsageError

MODEL_FILES = ("dite_manifest.json", "model_index.json")


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
