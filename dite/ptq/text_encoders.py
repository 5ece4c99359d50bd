"""Text encoders, weight-only, where a recipe asks for it: often larger than the transformer, run once a picture, and never calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dite.errors import QuantizationError, UsageError
from dite.models.access import text_encoders, unwrap
from dite.models.discovery import discover
from dite.models.planning import baseline_bytes, refuse_quantized
from dite.quant.apply import Progress, check_weights, quantize_linears_, state_bytes
from dite.quant.lora import refuse_adapters
from dite.quant.plan import LayerPlan, QuantPlan
from dite.quant.scheme import LayerScheme, WeightScheme


@dataclass(frozen=True)
class TextEncoder:
    """One encoder, and what will be done to the linears of its blocks."""

    name: str
    model: nn.Module
    plan: QuantPlan


def plan_text_encoders(model: Any, weight: WeightScheme) -> list[TextEncoder]:
    """What `weight` makes of each text encoder. Raises UsageError where there is none, or one is quantized already, QuantizationError for NaN."""
    found = text_encoders(model)
    if not found:
        why = f"{type(unwrap(model)).__name__} has none; text_encoders is for pipelines that read text"
        raise UsageError("there is no text encoder to quantize", why, "leave text_encoders out")
    planned: list[TextEncoder] = []
    for name, encoder in found.items():
        if any(one.model is encoder for one in planned):
            continue  # one model in two places
        _check_library(name, encoder)
        refuse_quantized(encoder)
        refuse_adapters(encoder, "quantized", "unload them first")
        known = discover(encoder)
        layers = [LayerPlan(one.name, "token", one.in_features, one.out_features, LayerScheme(weight=weight)) for one in known.linears]
        other = baseline_bytes(encoder) - 2 * sum(layer.in_features * layer.out_features for layer in layers)
        planned.append(TextEncoder(name, encoder, QuantPlan(layers, dict(known.outside), other, known.basis)))
        try:
            check_weights(encoder, planned[-1].plan)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error.what}", error.why, "repair the checkpoint, or leave text_encoders out") from error
    return planned


def quantize_text_encoders_(planned: list[TextEncoder], progress: Progress | None = None) -> dict[str, dict[str, int]]:
    """Round them to nearest, in place; returns how many layers each has, and its bytes on disk before (in bf16) and after."""
    from dite.checkpoint.transformers_quantizer import mark_text_encoder_  # imports transformers, which class-conditional models can do without

    facts = {}
    for one in planned:
        before = baseline_bytes(one.model)
        quantize_linears_(one.model, one.plan, progress and (lambda what, done, total, name=one.name: progress(f"{name}: {what}", done, total)))
        mark_text_encoder_(one.model, one.plan)
        facts[one.name] = {"layers": len(one.plan.layers), "baseline_bytes": before, "bytes": state_bytes(one.model)}
    return facts


def _check_library(name: str, encoder: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(encoder, PreTrainedModel):
        raise UsageError(f"{name} can't be quantized", f"a {type(encoder).__name__} is no model of transformers", "leave text_encoders out")
    from dite.checkpoint.transformers_quantizer import check_transformers

    check_transformers(f"{name} can't be quantized", "upgrade transformers, or leave text_encoders out")
