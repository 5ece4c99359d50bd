"""Calibration: what a denoiser sees while it samples, and from that the second moments of every linear's input.

`record` samples real trajectories with the pipeline itself, guidance and null labels included, and keeps some of the denoiser's calls: every
micro-batch another set of steps, so that together they cover the timesteps evenly. `observe` runs those calls again and gathers, for the layers it
is asked for, what GPTQ needs. Asking for a few layers at a time bounds memory; those quantized before are then seen with their errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dite.errors import NonFiniteOutput, QuantizationError, UsageError
from dite.recipe import Calibration
from dite.sampling import SampleSettings, sample, sample_seed

Progress = Callable[[str, int, int], None]
HOLD_OUT = 4  # one call in so many is held out
SEED_OFFSET = 1_000_003  # far from the seeds that evaluations use: nothing may be measured on the pictures it was calibrated on
TIMESTEPS = ("timestep", "timesteps", "t")  # how models call the argument
KEPT_ROWS = 512  # rows of a layer's held-out inputs that are kept as they are


@dataclass(frozen=True)
class Calls:
    """Keyword arguments of the denoiser's forward, one dict a call, tensors on the CPU; `held_out` are not calibrated on."""

    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


@dataclass
class LayerInputs:
    """What a linear was given: over `count` calibration rows, moments Σ x xᵀ fp32 [K, K], total Σ x [K] and peaks max |x| [K]; and about 512
    held-out `rows` [·, K] as they are."""

    moments: torch.Tensor
    count: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)
    total: torch.Tensor | None = None
    peaks: torch.Tensor | None = None
    curvatures: dict[Any, Any] = field(default_factory=dict)  # what was made of the moments, and is the same for all bits and groups,
    factors: dict[Any, Any] = field(default_factory=dict)  # kept by whoever made it

    def add(self, moments: torch.Tensor, total: torch.Tensor, peaks: torch.Tensor, count: int) -> None:
        """Count in some more rows."""
        self.moments += moments
        self.total = total.clone() if self.total is None else self.total + total
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)
        self.count += count


def record(
    pipe: Any, models: Mapping[str, nn.Module], conditions: Sequence[Any], settings: Calibration, progress: Progress | None = None
) -> dict[str, Calls]:
    """Sample one trajectory for each of `conditions`, keeping the calls of each of `models` at about `settings.num_calls` steps.

    The step kept moves on by one from one micro-batch to the next, and every fourth step kept is held out. Raises UsageError when so few are kept
    that none is.
    """
    how = SampleSettings(settings.num_steps, settings.guidance)
    stride = -(-(-(-len(conditions) // how.micro_batch) * settings.num_steps) // settings.num_calls)
    recorders = {name: _Recorder(model, settings.num_steps, stride) for name, model in models.items()}
    handles = [recorder.model.register_forward_pre_hook(recorder.keep, with_kwargs=True) for recorder in recorders.values()]
    seeds = [sample_seed(SEED_OFFSET + settings.seed, index) for index in range(len(conditions))]

    def tick(done: int, total: int) -> None:
        for recorder in recorders.values():
            recorder.steps_done = done
        if progress:
            progress("calibration", done, total)

    try:
        for _ in sample(pipe, conditions, seeds, how, progress=tick):
            pass
    except NonFiniteOutput as error:
        raise next(filter(None, (recorder.culprit() for recorder in recorders.values())), error) from error
    finally:
        for handle in handles:
            handle.remove()
    for recorder in recorders.values():
        if 0 < len(recorder.kept) < HOLD_OUT:
            raise UsageError(
                "calibration is too short",
                f"it keeps {len(recorder.kept)} of the sampler's steps, and one in {HOLD_OUT} is held out to judge by",
                "raise calibration.num_samples, num_steps or num_calls",
            )
    return {name: recorder.calls() for name, recorder in recorders.items()}


class _Recorder:
    """Keeps what a denoiser is called with at some steps; `steps_done` counts the sampler's steps over all micro-batches."""

    def __init__(self, model: nn.Module, num_steps: int, stride: int):
        self.model, self.num_steps, self.stride = model, num_steps, stride
        self.signature = inspect.signature(type(model).forward)
        self.steps_done = 0
        self.last: tuple[tuple, dict[str, Any]] | None = None  # what the model was called with last
        self.kept: dict[int, list[dict[str, Any]]] = {}  # by step: some pipelines call twice a step, with and without the condition

    def keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.last = (args, kwargs)
        batch, step = divmod(self.steps_done, self.num_steps)
        # Every batch another set of steps; where there is less than one call a batch, every so many calls in the order they come.
        if (step + batch if self.stride <= self.num_steps else self.steps_done + batch) % self.stride == 0:
            given = dict(self.signature.bind(module, *args, **kwargs).arguments)
            del given[next(iter(self.signature.parameters))]
            given |= given.pop("kwargs", {})
            self.kept.setdefault(self.steps_done, []).append(_mapped(given, lambda tensor: tensor.detach().to("cpu", copy=True)))

    @torch.no_grad()
    def culprit(self) -> QuantizationError | None:
        """The first layer that makes NaN or inf of finite inputs in the last call, as an error; None where no layer does."""
        found: list[str] = []

        def watch(name: str) -> Callable:
            def hook(_module: nn.Module, _args: tuple, result: Any) -> None:
                if isinstance(result, torch.Tensor) and not torch.isfinite(result).all():
                    found.append(name)

            return hook

        leaves = ((name, module) for name, module in self.model.named_modules() if not next(module.children(), None))
        handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
        try:
            args, kwargs = self.last
            self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            return None
        given = dict(self.signature.bind(self.model, *args, **kwargs).arguments)
        why = f"at timestep {timestep_of(given)} of calibration, which runs the model on its own trajectories"
        return QuantizationError(f"layer {found[0]} gave NaN or inf", why, "try it in float32 first, or repair the checkpoint")

    def calls(self) -> Calls:
        """What was kept; every fourth step is held out, whole."""
        steps = list(self.kept.values())
        calibration = [call for index, some in enumerate(steps) if index % HOLD_OUT != HOLD_OUT - 1 for call in some]
        return Calls(calibration, [call for some in steps[HOLD_OUT - 1 :: HOLD_OUT] for call in some])


@torch.no_grad()
def observe(model: nn.Module, names: Iterable[str], calls: Calls) -> dict[str, LayerInputs]:
    """Run `calls` through `model` and gather the inputs of the linears called `names`; one that is never called in
    `calls.calibration` is missing from the answer.

    Raises QuantizationError, which names the layer and the timestep, for inputs that are NaN or inf.
    """
    observer = _Observer(rows_a_call=max(1, KEPT_ROWS // max(1, len(calls.held_out))))
    handles = [model.get_submodule(name).register_forward_pre_hook(observer.hook(name)) for name in names]
    try:
        for observer.held_out, some in ((False, calls.calibration), (True, calls.held_out)):
            for observer.call, call in enumerate(some):
                observer.timestep = timestep_of(call)
                model(**_mapped(call, lambda tensor: tensor.to(_device(model))))
    finally:
        for handle in handles:
            handle.remove()
    return {name: inputs for name, inputs in observer.found.items() if inputs.count}


def timestep_of(call: Mapping[str, Any]) -> str:
    """The timesteps that a denoiser is called for, as people read them; whatever the model calls the argument."""
    value = next((call[name] for name in TIMESTEPS if call.get(name) is not None), None)
    if value is None:
        return "unknown"
    return ", ".join(f"{one:g}" for one in sorted(set(torch.as_tensor(value).flatten().tolist())))


class _Observer:
    """Sums up inputs as they come: whatever a model does to them afterwards, and however many layers are watched, nothing else is held."""

    def __init__(self, rows_a_call: int):
        self.rows_a_call = rows_a_call
        self.found: dict[str, LayerInputs] = {}
        self.held_out, self.call, self.timestep = False, 0, "unknown"
        self.last: tuple | None = None  # queries, keys and values are made from one input

    def hook(self, name: str) -> Callable:
        return lambda _module, args: self.add(name, args[0])

    def add(self, name: str, x: torch.Tensor) -> None:
        stats = self.found.setdefault(name, LayerInputs(torch.zeros(x.shape[-1], x.shape[-1], device=x.device)))
        if self.last is None or self.last[0] is not x or self.last[1] != x._version:
            self.last = (x, x._version, self.summary(name, x.reshape(-1, x.shape[-1]).float()))
        if self.held_out:
            stats.rows.append(self.last[2])
        else:
            stats.add(*self.last[2], x.numel() // x.shape[-1])

    def summary(self, name: str, rows: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not torch.isfinite(rows.sum()):
            why = f"at timestep {self.timestep} of calibration, which runs the model on its own trajectories"
            raise QuantizationError(f"layer {name} was given NaN or inf", why, "repair the checkpoint, or try it in float32 first")
        if not self.held_out:
            return rows.T @ rows, rows.sum(0), rows.abs().amax(0)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.call))[: self.rows_a_call]
        return rows[chosen.to(rows.device)]


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change` applied to every tensor in it, however deep in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if type(value) in (list, tuple) else value


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
