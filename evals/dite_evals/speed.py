"""How long a whole forward takes: quantized by each recipe and by each peer, against the same model in bf16.

All variants are in memory at once and share their rounds (see dite_kernels.bench.timing). Recipes round to nearest: how well codes were chosen has
no influence on time. Peers quantize the token linears of the first recipe, and nothing else; the time lies there, and some of their int8 products
refuse the few rows of conditioning layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import dite
from dite.errors import DiteError, UsageError, did_you_mean
from dite_evals import report
from dite_evals.memory import held_bytes, stored_bytes
from dite_evals.speed_peers import SETTINGS, Setting
from dite_kernels import backends
from dite_kernels.bench.environment import environment
from dite_kernels.bench.timing import Budget, Clock, Timing, interleave, wall_clock

BASELINE = "torch-bf16-eager"
COMPILED = "torch-bf16-compiled"
WARM_UP_CALLS = 2
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """Recipes (names, files or QuantRecipes), the backends that run them (`auto`: dite's choice), peers by the names of speed_peers, and whether
    compiled bf16 and compiled peers are measured too."""

    recipes: list[Any]
    backends: list[str] = field(default_factory=lambda: ["auto"])
    peers: list[str] = field(default_factory=list)
    compiled: bool = False
    budget: Budget = field(default_factory=Budget)

    def check(self) -> None:
        """Raise UsageError for names that mean nothing."""
        if not self.recipes or not self.backends:
            raise UsageError("nothing to measure", "a forward bench needs at least one recipe and one backend", "for example --recipes w4a8")
        for kind, wanted, known in (("backend", self.backends, ["auto", *backends.BACKENDS]), ("peer", self.peers, list(SETTINGS))):
            unknown = next((name for name in wanted if name not in known), None)
            if unknown is not None:
                raise UsageError(
                    f"no {kind} named {unknown}", f"known: {', '.join(known)}", did_you_mean(unknown, known) or f"use one of these {kind}s"
                )


@dataclass(frozen=True)
class Variant:
    """One way to compute the forward: a row's first keys, the module that holds the weights, and what is called with the inputs."""

    name: str
    facts: dict[str, Any]
    module: nn.Module
    forward: Callable[..., Any]


@torch.no_grad()
def bench_forward(
    model: nn.Module, inputs: Mapping[str, Any], asked: Asked, *, clock: Clock | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Time `model(**inputs)` in bf16 and in every variant asked for; `model` is in bf16, and stays as it is.

    Returns the document: environment, inputs' shapes, rows, notes. Raises UsageError for unknown names, and what `dite.quantize` raises.
    """
    asked.check()
    device = next(model.parameters()).device
    clock, notes = clock or wall_clock(device), []
    rows, outputs, measured = {}, {}, {}
    for variant in _variants(model.eval(), asked, notes):
        name = variant.name
        if progress:
            progress(f"variants: {name}", len(measured) + 1, len(measured) + 1)
        try:
            for _ in range(WARM_UP_CALLS):
                outputs[name] = _first(variant.forward(**inputs))
        except Exception as error:  # of a compiler, a backend, a library of someone else's
            if name == BASELINE:
                raise
            notes.append(f"{name}: {_explained(error)}")
            continue
        measured[name] = variant
        rows[name] = variant.facts | _memory(variant, inputs, device)
    calls = {name: (lambda variant=variant: variant.forward(**inputs)) for name, variant in measured.items()}
    timings = interleave(calls, BASELINE, asked.budget, clock)
    shape = _shape(model, inputs, measured)
    found = [_row(name, row, shape, timings[name], _error(outputs, name)) for name, row in rows.items()]
    return {"environment": report.environment() | environment(), "inputs": _sizes(inputs), "rows": found, "notes": notes}


def batched(inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Inputs of one sample, repeated."""

    def repeat(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.repeat(rows, *[1] * (value.dim() - 1)) if value.dim() and len(value) == 1 else value
        if isinstance(value, Mapping):
            return {key: repeat(item) for key, item in value.items()}
        return value * rows if isinstance(value, list) and len(value) == 1 else value

    return {key: repeat(value) for key, value in inputs.items()}


def _variants(model: nn.Module, asked: Asked, notes: list[str]) -> Iterator[Variant]:
    yield Variant(BASELINE, _facts(BASELINE, (16, None)), model, model)
    if asked.compiled:
        yield Variant(COMPILED, _facts(COMPILED, (16, None)), model, _compiled(model))
    layers: list[str] = []
    for recipe in asked.recipes:
        quantized = copy.deepcopy(model)
        done = dite.quantize(quantized, recipe, effort="fast")
        kinds = {layer["name"]: layer["kind"] for layer in done.layers}
        layers = layers or _tokens(kinds)
        for backend in asked.backends:
            variant = _ours(copy.deepcopy(quantized), done.recipe.name, backend, kinds, notes)
            if variant is not None:
                yield variant
    for name in asked.peers:
        for setting in SETTINGS[name]:
            yield from _peers(model, setting, layers, asked.compiled, notes)


def _ours(model: nn.Module, recipe: str, backend: str, kinds: Mapping[str, str], notes: list[str]) -> Variant | None:
    """`backend` runs every token linear, or there is a note and no variant; conditioning linears that it can't run are left to dite's own choice.

    `kinds` are the quantized layers of `model` with their kinds.
    """
    tokens, used = _tokens(kinds), {}
    for name in kinds:
        layer = model.get_submodule(name)
        try:
            found = backends.select(layer.spec, layer.scale.device, None if backend == "auto" else backend)
        except backends.BackendUnavailable as error:
            if name in tokens:
                notes.append(f"{recipe} on {backend}: {name}: {error}")
                return None
            continue
        layer.backend = backend
        used |= {found.name: None} if name in tokens else {}
    spec = model.get_submodule(tokens[0]).spec
    granularity = None if spec.activation_bits is None else "group" if spec.activation_per_group else "token"
    more = {"group_size": spec.group_size, "activation_granularity": granularity, "recipe": recipe, "layers": len(kinds)}
    facts = _facts("+".join(used), (spec.weight_bits, spec.activation_bits))
    return Variant(f"{recipe} on {backend}", facts | more, model, model)


def _tokens(kinds: Mapping[str, str]) -> list[str]:
    """The token linears; all layers of a model that has none."""
    return [name for name, kind in kinds.items() if kind == "token"] or list(kinds)


def _peers(model: nn.Module, setting: Setting, layers: list[str], compiled: bool, notes: list[str]) -> Iterator[Variant]:
    """A peer's model as it is, and compiled where its library wants that."""
    if setting.device not in (None, next(model.parameters()).device.type):
        return
    if setting.version is None:
        notes.append(f"{setting.name}: {setting.peer.library} is not installed")
        return
    quantized = copy.deepcopy(model)
    try:
        setting.peer.quantize_(quantized, layers)
    except Exception as error:  # whatever a library raises here is what there is to say about it
        notes.append(f"{setting.name}: {_explained(error)}")
        return
    granularity = None if setting.activation_bits is None else "token"
    more = {"group_size": setting.group_size, "activation_granularity": granularity, "setting": str(setting.peer), "layers": len(layers)}
    more |= {"version": setting.version}
    bits = (setting.weight_bits, setting.activation_bits)
    yield Variant(setting.name, _facts(setting.name, bits) | more, quantized, quantized)
    if compiled and setting.compiles:
        name = f"{setting.name}, compiled"
        yield Variant(name, _facts(name, bits) | more, quantized, _compiled(quantized))


def _facts(backend: str, bits: tuple[int, int | None]) -> dict[str, Any]:
    keys = {"op": "forward", "backend": backend, "weight_bits": bits[0], "activation_bits": bits[1]}
    return keys | {"group_size": None, "activation_granularity": None}


def _compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, dynamic=False)


def _memory(variant: Variant, inputs: Mapping[str, Any], device: torch.device) -> dict[str, int | None]:
    """Bytes of the weights as they are stored; what is held for them now that it is warm; on CUDA what one forward holds at its peak, that included,
    and other variants not."""
    found = {"weight_bytes": stored_bytes(variant.module), "held_bytes": held_bytes(variant.module)}
    if device.type != "cuda":
        return found | {"peak_memory_bytes": None}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.forward(**inputs)
    torch.cuda.synchronize(device)
    return found | {"peak_memory_bytes": found["held_bytes"] + torch.cuda.max_memory_allocated(device) - before}


def _shape(model: nn.Module, inputs: Mapping[str, Any], measured: Mapping[str, Variant]) -> list[int]:
    """[M, K, N] of the linear that takes most of a forward's multiplications: the first of its kind."""
    seen: list[tuple[int, list[int]]] = []

    def see(module: nn.Linear, given: tuple, output: Any) -> None:
        rows = given[0].numel() // module.in_features
        seen.append((rows * module.in_features * module.out_features, [rows, module.in_features, module.out_features]))

    hooks = [module.register_forward_hook(see) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return max(seen, key=lambda one: one[0], default=(0, [0, 0, 0]))[1]


def _row(name: str, facts: dict[str, Any], shape: list[int], timing: Timing, error: float) -> dict[str, Any]:
    times = {"shape": shape, "us": timing.us, "baseline": BASELINE, "ratio_to_baseline": timing.ratio}
    return {"name": name} | facts | times | {"output_relative_error": error}


def _error(outputs: Mapping[str, torch.Tensor], name: str) -> float:
    """‖y − baseline's y‖ ÷ ‖baseline's y‖, in fp32: 0 for the baseline, and far below 1 for a forward that works."""
    exact = outputs[BASELINE].float()
    return float((outputs[name].float() - exact).norm() / exact.norm())


def _first(output: Any) -> torch.Tensor:
    found = output[0]
    return found if isinstance(found, torch.Tensor) else found[0]


def _sizes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value.shape) for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def _explained(error: Exception) -> str:
    if isinstance(error, DiteError):
        return f"{error.what}: {error.why}"
    lines = str(error).strip().splitlines()
    return f"failed, {type(error).__name__}: {lines[0] if lines else 'no message'}"
