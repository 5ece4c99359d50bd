"""How much room a model takes on disk, asked before writing it, and said when the disk turns out to be full."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from dite.errors import CheckpointError
from dite.quant.linear import QuantLinear
from dite_kernels.packing import packed_columns

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BESIDES_BYTES = 2**20  # configurations, headers, recipe, manifest; tokenizers are small too
HINT = "free some space, or choose another output"


def needed_bytes(model: Any) -> int:
    """About how many bytes a pipeline or model takes on disk: all its tensors, each once."""
    parts = [part for part in getattr(model, "components", {"": model}).values() if isinstance(part, nn.Module)]
    sizes: dict[int, int] = {}
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, QuantLinear):  # a backend may hold the codes in a layout of its own
            sizes[id(module)] = module.out_features * packed_columns(module.in_features, module.scheme.weight.num_bits)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not (isinstance(module, QuantLinear) and name == "qdata"):
                sizes[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values()) + BESIDES_BYTES


@contextmanager
def room(folder: Path, needed: int) -> Iterator[None]:
    """Raise CheckpointError, which says how many bytes are needed, if `folder`'s disk has less or turns out to be full."""
    disk = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise CheckpointError(f"no room for {folder}", f"{needed} bytes are needed, {free} are free on that disk", HINT)
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = error.errno in FULL if isinstance(error, OSError) else any(f"os error {code}" in str(error) for code in FULL)
        if not full and isinstance(error, OSError):
            raise
        free = shutil.disk_usage(disk).free
        why = f"about {needed} bytes are needed, {free} are free on that disk"
        why = why if full else f"{str(error).strip()}; {free} bytes are free on that disk"
        raise CheckpointError(f"can't write {folder}", why, HINT) from error
