"""Calibration: what a denoiser sees while it samples, and from that the second moments of every linear's input.

`record` samples real trajectories with the pipeline itself, guidance and null labels included, and keeps some of the denoiser's calls: every
micro-batch another set of steps, so that together they cover all timesteps evenly. `observe` runs those calls again and gathers, for the layers it
is asked for, what GPTQ needs. Asking for a few layers at a time bounds memory; those quantized before are then seen with their errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dite.errors import QuantizationError
from dite.recipe import Calibration
from dite.sampling import SampleSettings, sample, sample_seed

Progress = Callable[[str, int, int], None]
KEPT_ROWS = 512  # rows of a layer's held-out inputs that are kept as they are


@dataclass(frozen=True)
class Calls:
    """Keyword arguments of the denoiser's forward, one dict a call, tensors on the CPU; `held_out` are not calibrated on."""

    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


@dataclass
class LayerInputs:
    """What a linear was given: moments fp32 [K, K] = Σ x xᵀ over `count` calibration rows, and about 512 held-out `rows` [·, K] as they are."""

    moments: torch.Tensor
    count: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)


def record(
    pipe: Any, models: Mapping[str, nn.Module], conditions: Sequence[Any], settings: Calibration, progress: Progress | None = None
) -> dict[str, Calls]:
    """Sample one trajectory for each of `conditions`, keeping about `settings.num_calls` calls of each of `models`; every fourth is held out."""
    how = SampleSettings(settings.num_steps, settings.guidance)
    stride = max(1, -(-len(conditions) // how.micro_batch) * settings.num_steps // settings.num_calls)
    recorders = {name: _Recorder(model, settings.num_steps, stride) for name, model in models.items()}
    handles = [recorder.model.register_forward_pre_hook(recorder.keep, with_kwargs=True) for recorder in recorders.values()]
    seeds = [sample_seed(settings.seed, index) for index in range(len(conditions))]
    tick = (lambda done, total: progress("calibration", done, total)) if progress else None
    try:
        for _ in sample(pipe, conditions, seeds, how, progress=tick):
            pass
    finally:
        for handle in handles:
            handle.remove()
    kept = {name: recorder.kept for name, recorder in recorders.items()}
    return {name: Calls([call for index, call in enumerate(calls) if index % 4 != 3], calls[3::4]) for name, calls in kept.items()}


class _Recorder:
    """Keeps one call in `stride`, shifted from one micro-batch to the next, so that all of them together meet every timestep."""

    def __init__(self, model: nn.Module, num_steps: int, stride: int):
        self.model, self.num_steps, self.stride = model, num_steps, stride
        self.signature = inspect.signature(type(model).forward)
        self.seen = 0
        self.kept: list[dict[str, Any]] = []

    def keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        batch, step = divmod(self.seen, self.num_steps)
        self.seen += 1
        if (step + batch * (self.stride // 2 + 1)) % self.stride == 0:
            given = dict(self.signature.bind(module, *args, **kwargs).arguments)
            del given[next(iter(self.signature.parameters))]
            given |= given.pop("kwargs", {})
            self.kept.append(_mapped(given, lambda tensor: tensor.detach().to("cpu", copy=True)))


@torch.no_grad()
def observe(model: nn.Module, names: Iterable[str], calls: Calls) -> dict[str, LayerInputs]:
    """Run `calls` through `model` and gather the inputs of the linears called `names`; one that is never called is missing from the answer.

    Raises QuantizationError, which names the layer, for inputs that are NaN or inf.
    """
    modules = {name: model.get_submodule(name) for name in names}
    found: dict[str, LayerInputs] = {}
    for held_out, some in ((False, calls.calibration), (True, calls.held_out)):
        share = max(1, KEPT_ROWS // max(1, len(some)))
        for call in some:
            with _watched(modules) as inputs:
                model(**_mapped(call, lambda tensor: tensor.to(_device(model))))
            summaries: dict[int, torch.Tensor] = {}  # by identity: queries, keys and values are made from one tensor
            for name, x in inputs:
                rows = x.reshape(-1, x.shape[-1]).float()
                if id(x) not in summaries:
                    if not torch.isfinite(rows.sum()):
                        why = "calibration runs the model on its own trajectories"
                        raise QuantizationError(f"layer {name} was given NaN or inf", why, "try it in float32 first")
                    summaries[id(x)] = rows[:: max(1, -(-len(rows) // share))].clone() if held_out else rows.T @ rows
                stats = found.setdefault(name, LayerInputs(torch.zeros(x.shape[-1], x.shape[-1], device=x.device)))
                if held_out:
                    stats.rows.append(summaries[id(x)])
                else:
                    stats.moments += summaries[id(x)]
                    stats.count += len(rows)
    return found


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """What each module is given during one forward: (name, input) in order, held so that no two inputs have one identity."""
    inputs: list[tuple[str, torch.Tensor]] = []

    def watch(name: str) -> Callable:
        return lambda _module, args: inputs.append((name, args[0]))

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change` applied to every tensor in it, however deep in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if type(value) in (list, tuple) else value


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
