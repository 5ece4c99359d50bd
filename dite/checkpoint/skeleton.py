"""A model as its configuration describes it, on the meta device, where tensors take no memory: built under a limit, before any loader."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from dite.checkpoint.header import numel
from dite.errors import CheckpointError, first_line

BASE_MODULES, MODULES_A_TENSOR = 1_000, 20
BASE_TABLE_BYTES = 64 * 2**20
REFUSED = "weights and config.json are from different models"


@contextmanager
def described(file: str, class_name: str, tensors: int) -> Iterator[None]:
    """Whatever is built inside is on meta, within what `tensors` stored ones can be worth; failing constructors raise CheckpointError of `file`."""
    default = torch.get_default_dtype()
    try:
        with module_limit(tensors, file), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors without elements: what is wrong is said elsewhere
            yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model's constructor raises on numbers that don't fit each other
        raise CheckpointError(f"{file} describes no {class_name}", f"{type(error).__name__}: {first_line(error)}", "is the file damaged?") from error
    finally:
        torch.set_default_dtype(default)


def check_tables(skeleton: nn.Module, stored: dict[str, dict[str, Any]], file: str) -> None:
    """Raise CheckpointError where a model makes tables for itself, which are in no file, that are far larger than its weights."""
    weights, state = sum(numel(entry) for entry in stored.values()), skeleton.state_dict()
    tables = sum(4 * buffer.numel() for name, buffer in skeleton.named_buffers() if name not in state)
    if tables > BASE_TABLE_BYTES + 4 * weights:
        raise CheckpointError(f"{file} describes another model", f"its tables would take {tables} bytes beside {weights} weights", REFUSED)


@contextmanager
def module_limit(tensors: int, file: str) -> Iterator[None]:
    """Raise CheckpointError as soon as this thread builds more modules than `tensors` stored tensors can be worth."""
    most, count, thread = BASE_MODULES + MODULES_A_TENSOR * tensors, 0, threading.get_ident()

    def built(_module: nn.Module, _name: str, _value: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise CheckpointError(
                    f"{file} describes another model", f"it has more than {most} modules; the files hold {tensors} tensors", REFUSED
                )

    hooks = [register_module_module_registration_hook(built), register_module_parameter_registration_hook(built)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
