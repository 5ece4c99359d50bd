"""Changes to a live model that can be undone: replaced methods and hooks, taken back in reverse order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


class Hooks:
    """Everything that was put on a model; `undo` takes it off again."""

    def __init__(self):
        self._stack = ExitStack()

    def undo(self) -> None:
        self._stack.close()

    def replace(self, owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
        """owner.name becomes make(owner.name), on this object only."""
        own = vars(owner).get(name)
        setattr(owner, name, make(getattr(owner, name)))

        def back() -> None:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        self._stack.callback(back)

    def mark(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value, for as long as this is not undone."""
        setattr(owner, name, value)
        self._stack.callback(delattr, owner, name)

    def before(self, module: nn.Module, hook: Callable[[tuple, dict], tuple[tuple, dict]]) -> None:
        """hook(args, kwargs) → (args, kwargs) before each call."""
        self._stack.callback(module.register_forward_pre_hook(lambda _, args, kwargs: hook(args, kwargs), with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[[Any], Any]) -> None:
        """hook(output) → output after each call."""
        self._stack.callback(module.register_forward_hook(lambda _, __, output: hook(output)).remove)
