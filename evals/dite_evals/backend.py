"""torchmetrics, imported when first needed."""

from importlib import import_module
from types import ModuleType

from dite.errors import UnsupportedEnvironment


def torchmetrics(module: str) -> ModuleType:
    """`torchmetrics.{module}`, or UnsupportedEnvironment that says how to install it."""
    try:
        return import_module(f"torchmetrics.{module}")
    except ImportError as error:
        raise UnsupportedEnvironment(
            "image quality can't be measured here", f"torchmetrics is missing or broken ({error})", 'pip install "dite[eval]"'
        ) from error
