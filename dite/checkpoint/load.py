"""Load a saved folder after checking it; plain `from_pretrained` loads the same folder without the checks."""

from pathlib import Path
from typing import Any

import torch

from dite.checkpoint.format import check_folder
from dite.errors import UsageError
from dite.models.access import denoisers, text_encoders
from dite.models.load import complete, from_pretrained, parse_device, parse_dtype, resolve
from dite.quant.linear import set_backend


def load(folder: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None, backend: str = "auto") -> Any:
    """A pipeline (or bare model) saved by `dite.save`, verified: manifest, sizes, headers, digests, then every scale.

    `dtype` None gives what `from_pretrained` would. A folder without a manifest is loaded with structural checks only. Raises CheckpointError for
    a damaged or hostile folder, UnsupportedEnvironment when `backend` can't run it.
    """
    path = resolve(folder)
    parse_device(device)
    if isinstance(path, str):
        raise UsageError(f"no folder {folder}", "dite.load takes a folder or builtin:NAME", "for a hub id use dite.Pipeline.from_pretrained")
    sealed = check_folder(path)
    model = complete(from_pretrained(path, parse_dtype(dtype), sealed), path, sealed).to(device)
    for part in (*denoisers(model).values(), *text_encoders(model).values()):
        set_backend(part, backend)
    return model
