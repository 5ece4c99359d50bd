"""Find a diffusion transformer's blocks and its linears without knowing its name.

Blocks are the outermost `ModuleList`s with at least two members of one class that hold linears and more than 2% of the parameters. Linears inside
blocks are `token` linears when they see a sequence (rank 3, length > 1) and `conditioning` linears when they see one vector a sample (adaLN and the
like). That is observed in one forward of example inputs; without any, it is read off the structure. Everything outside the blocks (patch and time
embedders, the last projection) is small and sensitive, and stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dite.errors import UnsupportedModel, UsageError, first_line
from dite.quant.apply import quantizable_dtype
from dite.quant.linear import QuantLinear

OUTSIDE = "outside the transformer blocks (embedder or last projection)"
READ_DIRECTLY = "nn.MultiheadAttention reads this layer's weight itself"
OWN_FORWARD = "its class computes something else than a linear"
HOOKED = "it has hooks on its forward, which a quantized layer would lose"
MIN_SHARE = 0.02
MIN_MEMBERS = 2
# Class-name fragments of modules whose linears see the conditioning vector, for models that can't be run.
CONDITIONING_CLASSES = ("AdaLayerNorm", "AdaNorm", "Modulation", "Timestep", "Embedding")


@dataclass(frozen=True)
class BlockList:
    """A ModuleList of transformer blocks."""

    path: str
    class_name: str
    count: int


@dataclass(frozen=True)
class LinearInfo:
    """A linear inside a block; `kind` is `token` or `conditioning`."""

    name: str
    kind: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Discovery:
    """What was found; `basis` says how kinds were told apart; `outside` are the linears that no block holds."""

    blocks: list[BlockList]
    linears: list[LinearInfo]
    outside: dict[str, str] = field(default_factory=dict)
    basis: str = "observed"


def discover(model: nn.Module, example_inputs: Mapping | None = None, *, strict: bool = False) -> Discovery:
    """Blocks and linears of `model`. Raises UnsupportedModel when it has no repeated transformer blocks.

    When the forward on `example_inputs` fails, structure decides, and `basis` says so; with `strict` (a user's own) it is a UsageError.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of at least {MIN_MEMBERS} like blocks with linears and more than {MIN_SHARE:.0%} of its parameters",
            "dite works on diffusion transformers; UNets and single-block models are not supported",
        )
    inside, outside = {}, {}
    for name, module in model.named_modules():
        if is_linear(module):
            reason = skip_reason(name, module, any(name.startswith(block.path + ".") for block in blocks))
            (outside if reason else inside)[name] = reason or module
    kinds, basis = observe_kinds(model, inside, example_inputs) if example_inputs else ({}, "structure")
    if strict and basis != "observed":
        raise UsageError("the example inputs don't fit the model", basis, "give the keyword arguments of the model's forward")
    linears = [
        LinearInfo(name, kinds.get(name) or kind_by_structure(model, name), module.in_features, module.out_features)
        for name, module in inside.items()
    ]
    return Discovery(blocks, linears, outside, basis)


def find_blocks(model: nn.Module) -> list[BlockList]:
    """The outermost block lists, in the model's order."""
    total = max(1, sum(parameter.numel() for parameter in model.parameters()))
    found: list[BlockList] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(block.path + ".") for block in found):
            continue
        names = [type(member).__name__ for member in module]
        class_name = max(names, key=names.count, default="")
        tensors = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
        if names.count(class_name) >= MIN_MEMBERS and tensors > MIN_SHARE * total and any(is_linear(inner) for inner in module.modules()):
            found.append(BlockList(path, class_name, len(module)))
    return found


def is_linear(module: nn.Module) -> bool:
    """A linear, also a subclass of it."""
    return isinstance(module, nn.Linear)


def skip_reason(name: str, module: nn.Module, inside: bool) -> str | None:
    """Why a linear is left alone whatever a recipe's defaults say; None for those that they decide."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return READ_DIRECTLY
    if not _just_linear(module):
        return f"{OWN_FORWARD} ({type(module).__name__})"
    if _hooked(module) and not module.weight.is_meta and quantizable_dtype(module.weight):  # otherwise `check_weights` tells the better reason
        return HOOKED
    return None if inside else OUTSIDE


def _just_linear(module: nn.Linear) -> bool:
    """Whether calling the module is x·Wᵀ + b."""
    if isinstance(module, QuantLinear) or type(module).forward is nn.Linear.forward:
        return True
    # diffusers' own, a linear like any other until an adapter of the old kind is put in.
    return type(module).__name__ == "LoRACompatibleLinear" and module.lora_layer is None


def _hooked(module: nn.Linear) -> bool:
    """Whether something listens to the module or was put in the place of its forward (as accelerate and diffusers do), other than our own hooks."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in vars(module) or any(not str(getattr(hook, "__module__", "")).startswith("dite.") for hook in hooks)


@torch.no_grad()
def observe_kinds(model: nn.Module, linears: Mapping[str, nn.Module], example_inputs: Mapping) -> tuple[dict[str, str], str]:
    """Run one forward and see what each linear gets. Returns the kinds, and how they were found; a failing forward is told, not hidden."""
    kinds: dict[str, str] = {}

    def watch(name: str):
        def hook(_module, inputs):
            x = inputs[0]
            kinds[name] = "token" if x.dim() > 2 and x.shape[-2] > 1 else "conditioning"

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(**example_inputs)
    except Exception as error:  # a model may fail in any way on inputs that don't fit it
        return {}, f"structure (the example forward failed: {first_line(error)})"
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return kinds, "observed"


def kind_by_structure(model: nn.Module, name: str) -> str:
    """`conditioning` below a normalisation-with-modulation or an embedder, or right after a SiLU; else `token`."""
    parts = name.split(".")
    module = model
    for index, part in enumerate(parts[:-1]):
        module = getattr(module, part)
        if index and any(fragment in type(module).__name__ for fragment in CONDITIONING_CLASSES):
            return "conditioning"
    for (_, before), (child, _) in pairwise(module.named_children()):
        if is_linear(before):
            break  # an activation behind a linear makes a feed-forward, not a modulation
        if child == parts[-1] and isinstance(before, nn.SiLU):
            return "conditioning"
    return "token"
