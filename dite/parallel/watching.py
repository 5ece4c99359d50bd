"""Learning from a pipeline where its requests begin and which guidance branch it computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dite.parallel.clock import Clock
from dite.parallel.hooks import Hooks


def watch(pipe: Any, model: nn.Module, clock: Clock, hooks: Hooks, begin: Callable[[int], None]) -> None:
    """`begin(steps)` is called whenever the pipeline has set its scheduler's timesteps; `clock.context` is what it names in `cache_context`."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        clock.told = True

        def beginning(set_timesteps: Callable) -> Callable:
            def begun(*args: Any, **kwargs: Any) -> Any:
                result = set_timesteps(*args, **kwargs)
                begin(len(scheduler.timesteps))
                return result

            begun.__signature__ = inspect.signature(set_timesteps)  # pipelines read which arguments it takes
            return begun

        hooks.replace(scheduler, "set_timesteps", beginning)
    if hasattr(model, "cache_context"):

        def named(cache_context: Callable) -> Callable:
            @contextmanager
            def inside(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
                before, clock.context = clock.context, name
                try:
                    with cache_context(name, *args, **kwargs):
                        yield
                finally:
                    clock.context = before

            return inside

        hooks.replace(model, "cache_context", named)
