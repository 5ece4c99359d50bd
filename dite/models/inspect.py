"""The `inspect` verb: what dite sees in a model, what it can do with it and, if not, why; sizes and times in advance."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from dite.errors import DiteError
from dite.models.access import text_encoders, the_denoiser
from dite.models.discovery import Discovery, discover
from dite.models.families import example_inputs
from dite.models.planning import baseline_bytes, make_plan
from dite.quant.apply import quantized_layers, state_bytes
from dite.quant.linear import QuantLinear, select_backend
from dite.quant.plan import QuantPlan
from dite.recipe import load_recipe, recipe_names


@dataclass(frozen=True)
class Inspection:
    """What was found. `sizes`: bytes on disk by recipe (`bf16` is the baseline); `basis`: how token and conditioning linears were told apart;
    `text_encoders`: class, parameters, bytes as they are now and quantized layers by width of each."""

    model_class: str
    parameters: int
    discovery: Discovery | None
    supports: dict[str, dict[str, Any]]
    sizes: dict[str, int]
    quantize_seconds: float | None
    quantized: dict[str, Any] | None
    text_encoders: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The keys of `dite inspect --json`."""
        found = self.discovery
        return {
            "model_class": self.model_class,
            "parameters": self.parameters,
            "blocks": [{"path": block.path, "class": block.class_name, "count": block.count} for block in (found.blocks if found else [])],
            "linears": [vars(linear) for linear in (found.linears if found else [])],
            "basis": found.basis if found else None,
            "supports": self.supports,
            "sizes": self.sizes,
            "estimated_seconds": {"quantize": self.quantize_seconds},
            "quantized": self.quantized,
            "text_encoders": self.text_encoders,
        }

    def __str__(self) -> str:
        lines = [f"{self.model_class}: {self.parameters / 1e6:.1f} M parameters"]
        if self.discovery:
            lines += [f"  {block.count} × {block.class_name} in {block.path}" for block in self.discovery.blocks]
            kinds = Counter(linear.kind for linear in self.discovery.linears)
            lines.append(f"  {kinds['token']} token linears, {kinds['conditioning']} conditioning linears (by {self.discovery.basis})")
        if self.quantized:
            lines.append(f"  quantized: {_counted(self.quantized['layers'])}")
        lines += [f"  {name:<8}{size / 1e6:10.1f} MB" for name, size in self.sizes.items()]
        if self.sizes:
            lines[-1] += "    (what a recipe leaves alone counted in bf16)"
        if self.quantize_seconds is not None:
            lines.append(f"  quantizing takes about {self.quantize_seconds:.1f} s")
        for name, one in self.text_encoders.items():
            line = f"  {name}: {one['class']}, {one['parameters'] / 1e6:.1f} M parameters, {one['bytes'] / 1e6:.1f} MB"
            lines.append(line + (f", quantized: {_counted(one['layers'])}" if one["layers"] else ""))
        return "\n".join(lines + [f"  {verb:<12}{'yes' if answer['ok'] else 'no: ' + answer['reason']}" for verb, answer in self.supports.items()])


def inspect(model: Any) -> Inspection:
    """Look at a pipeline or a bare model without changing it. Raises UnsupportedModel only when there is no transformer at all."""
    transformer = the_denoiser(model)
    quantized = stats(model) if quantized_layers(transformer) else None
    discovery, plans, reason = None, {}, None
    try:
        discovery = discover(transformer, example_inputs(transformer))
        plans = {name: make_plan(transformer, load_recipe(name), discovery) for name in recipe_names()}
    except DiteError as error:
        reason = error.why or error.what
    sizes = {"bf16": baseline_bytes(transformer)} | {name: plan.estimated_bytes for name, plan in plans.items()} if plans else {}
    return Inspection(
        model_class=type(transformer).__name__,
        parameters=_parameters(transformer),
        discovery=discovery,
        supports=_supports(model, reason),
        sizes=sizes,
        quantize_seconds=_seconds(transformer, next(iter(plans.values()))) if plans else None,
        quantized=quantized,
        text_encoders={name: _encoder(encoder) for name, encoder in text_encoders(model).items()},
    )


def stats(model: Any) -> dict[str, Any]:
    """Bytes of the transformer's weights, how many layers have which widths, and which backend runs them."""
    transformer = the_denoiser(model)
    layers = quantized_layers(transformer)
    backends = Counter(select_backend(layer.spec, layer.scale.device, layer.backend).name for layer in layers.values())
    return {"bytes": state_bytes(transformer), "layers": _widths(transformer), "backends": dict(backends)}


def _encoder(model: torch.nn.Module) -> dict[str, Any]:
    return {"class": type(model).__name__, "parameters": _parameters(model), "bytes": state_bytes(model), "layers": _widths(model)}


def _supports(model: Any, refusal: str | None) -> dict[str, dict[str, Any]]:
    whole = hasattr(model, "components") or hasattr(model, "pipe")
    pipeline = {"ok": whole, "reason": None if whole else "a bare model has no sampler; pass a pipeline"}
    return {
        "quantize": {"ok": refusal is None, "reason": refusal},
        "save": {"ok": True, "reason": None},
        "generate": pipeline,
        "evaluate": pipeline,
        **_parallel_supports(model),
        "serve": pipeline,
    }


def _parallel_supports(model: Any) -> dict[str, dict[str, Any]]:
    """`parallelize`, and each of its modes."""
    from dite.parallel.checks import refuse
    from dite.parallel.topology import MODES, parse

    found = {}
    for mode in MODES:
        try:
            refuse(model, parse(mode, 2), lambda step, layer: "int4")
            found[mode] = {"ok": True, "reason": None}
        except DiteError as error:
            found[mode] = {"ok": False, "reason": error.why}
    ok = any(answer["ok"] for answer in found.values())
    return {"parallelize": {"ok": ok, "reason": None if ok else found[MODES[-1]]["reason"]}, **found}


def _parameters(model: torch.nn.Module) -> int:
    own = sum(parameter.numel() for parameter in model.parameters())
    return own + sum(
        layer.in_features * layer.out_features + (layer.out_features if layer.bias is not None else 0) for layer in quantized_layers(model).values()
    )


@torch.no_grad()
def _seconds(model: torch.nn.Module, plan: QuantPlan) -> float:
    """Time one layer of the commonest shape and scale it to all planned weights."""
    layer = max(plan.layers, key=lambda layer: (layer.in_features * layer.out_features <= 2**22, layer.in_features * layer.out_features))
    started = time.perf_counter()
    QuantLinear.from_linear(model.get_submodule(layer.name), layer.scheme, layer.name)
    elapsed = time.perf_counter() - started
    return elapsed * sum(other.in_features * other.out_features for other in plan.layers) / (layer.in_features * layer.out_features)


def _widths(model: torch.nn.Module) -> dict[str, int]:
    return dict(Counter(_width(layer) for layer in quantized_layers(model).values()))


def _counted(widths: dict[str, int]) -> str:
    return ", ".join(f"{count} × {width}" for width, count in widths.items())


def _width(layer: QuantLinear) -> str:
    weight, activation = layer.scheme.weight, layer.scheme.activation
    return f"W{weight.num_bits}{f'A{activation.num_bits}' if activation else ''} g{weight.group_size or 'all'}"
