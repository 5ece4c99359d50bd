"""Whether a model can be shared out: by what is known of its family, and by trying it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dite.errors import DiteError, UnsupportedModel
from dite.models.access import denoisers, the_denoiser
from dite.models.families import example_inputs
from dite.parallel.codecs import codec
from dite.parallel.families import attentions_of, blocks_of, family_of
from dite.parallel.modes import ROLES
from dite.parallel.stream import DTYPES
from dite.parallel.topology import STALE, Topology

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # sums in another order, through all blocks
ONE_DEVICE = "use it on one device"
MOST_ULYSSES = 256 // ROLES  # a byte of a packet's header tells receiver and role


def refuse(pipe: Any, topology: Topology, codec_of: Callable[[int, int], str]) -> None:
    """Raises UnsupportedModel or UsageError for what can be known to be impossible before ranks meet. `pipe`: a pipeline or a bare model."""
    model = the_denoiser(pipe)
    several = denoisers(pipe)
    if len(several) > 1:
        raise UnsupportedModel(f"the pipeline has {len(several)} transformers ({', '.join(several)}), and only one can be shared out", ONE_DEVICE)
    family = family_of(model)
    attentions = attentions_of(model, family)
    blocks = blocks_of(model, family)
    if any(hasattr(module, "_hf_hook") for module in (model, *blocks)):
        raise UnsupportedModel("accelerate's hooks (offloading, device_map) replace the model's forward at every call", "load it on one device")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in (model, *blocks, *attentions)):
        raise UnsupportedModel("the model is compiled, and exchanges between ranks can't be", "share out the model as it was before compile()")
    if model.dtype not in DTYPES:
        raise UnsupportedModel(f"the model is in {model.dtype}, and packets carry {', '.join(map(str, DTYPES))}", "load it in one of those")
    for layer in range(len(attentions)):
        codec(codec_of(1, layer))
    if topology.ulysses > MOST_ULYSSES:
        raise UnsupportedModel(f"ulysses has at most {MOST_ULYSSES} ranks, not {topology.ulysses}", "use ulysses+ring")
    heads = min(getattr(attention, "heads", topology.ulysses) for attention in attentions)
    if heads < topology.ulysses:
        raise UnsupportedModel(f"ulysses can't share {heads} heads out over {topology.ulysses} ranks", f"use at most {heads} ranks, or kv_gather")
    if topology.cfg > 1 and not family.batched:
        name = type(model).__name__
        raise UnsupportedModel(f"pipelines call {name} once for each guidance branch, so cfg has nothing to share out", "use another mode")
    if topology.mode in STALE and family.text is not None and topology.tokens > 1:
        reason = f"text tokens take part in its attention, and would differ between the ranks of {topology.mode}"
        raise UnsupportedModel(reason, "use kv_gather, ring or ulysses")
    if topology.mode == "pipefusion" and len(blocks) < topology.tokens:
        raise UnsupportedModel(f"{len(blocks)} blocks can't be shared out over {topology.tokens} ranks", f"use at most {len(blocks)} ranks")


@torch.no_grad()
def compare_with_one_device(model: nn.Module, topology: Topology, shared_out: Callable[[], AbstractContextManager]) -> None:
    """Call the model once alone and once inside `shared_out()`, without a codec; raises UnsupportedModel where the results differ. Models whose
    inputs dite can't make up are let through."""
    inputs = example_inputs(model)
    if inputs is None:
        return
    if topology.cfg > 1:
        inputs = repeated(inputs, topology.cfg)
    expected = model(**inputs)[0]
    name = type(model).__name__
    try:
        with shared_out():
            got = model(**inputs)[0]
    except DiteError:
        raise
    except Exception as error:  # whatever a model may trip over when it gets some of its tokens
        raise UnsupportedModel(f"{name} fails when its tokens are shared out: {error}", ONE_DEVICE) from error
    error = float((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
    limit = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
    if not error <= limit:
        rule = f"shared out over {topology.world} ranks by {topology.mode}, {name} differs by {error:.1e}, where rounding allows {limit:.0e}"
        raise UnsupportedModel(rule, ONE_DEVICE)


def repeated(value: Any, count: int) -> Any:
    """The inputs of `count` samples, from those of one."""
    if isinstance(value, Mapping):
        return {name: repeated(one, count) for name, one in value.items()}
    return torch.cat([value] * count) if isinstance(value, torch.Tensor) and value.ndim else value
