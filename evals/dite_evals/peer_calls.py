"""The quantizers that evals/peers.py and `dite bench forward` measure, and the calls they make: each library's documented way to quantize a
transformer in place.

Calls are data, so that a row's text and what was run are the same thing, and this file is read without the libraries. They quantize the given
layers and no others; the layers are the only thing that is passed beyond what `Peer.options` says.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

INT4 = "torchao.prototype.quantization.int4.inference_workflow"


@dataclass(frozen=True)
class Named:
    """A value that only the library can make: its name there, and what to call it with, if it is to be called."""

    name: str
    arguments: tuple | None = None

    def __repr__(self) -> str:
        return self.name if self.arguments is None else f"{self.name}({', '.join(map(repr, self.arguments))})"

    def find(self, module: Any) -> Any:
        """The value itself, looked up in the library's module (in torch for torch's own)."""
        value = attrgetter(self.name.removeprefix("torch."))(torch if self.name.startswith("torch.") else module)
        return value if self.arguments is None else value(*self.arguments)


@dataclass(frozen=True)
class Peer:
    """One setting of one library. `name` and `group_size` (None: one scale a row) tell it from the others.

    `config` and `module` are torchao's: its settings are objects. `declined` is why a setting is not run at all.
    """

    library: str
    what: str
    group_size: int | None
    options: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    module: str = "torchao.quantization"
    note: str = ""
    declined: str = ""

    @property
    def name(self) -> str:
        return f"{self.library} {self.what}"

    def __str__(self) -> str:
        """The call, as it is made."""
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        if self.library == "optimum-quanto":
            return f"quantize(transformer, {options}, include=LAYERS); freeze(transformer)"
        if self.library == "torchao":
            return f"quantize_(transformer, {self.config}({options}), filter_fn=LAYERS)"
        return f"sdnq_post_load_quant(transformer, {options}, add_skip_keys=False, modules_to_not_convert=OTHERS)"

    def quantize_(self, transformer: nn.Module, layers: Collection[str]) -> None:
        """Make the call. Raises whatever the library does."""
        CALLS[self.library](self, transformer, layers)

    @property
    def weights_only(self) -> bool:
        """Whether activations stay as they are, so that a layer is a matrix and can be computed with as one."""
        return "activations" not in self.what and "matmul" not in self.what

    def values(self, module: Any) -> dict[str, Any]:
        """The options, with the library's own values looked up."""
        return {key: value.find(module) if isinstance(value, Named) else value for key, value in self.options.items()}


def plain_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state dict; one of a class of its own is taken apart into those that are stored for it, `name.part`."""
    for name, value in state.items():
        if hasattr(value, "__tensor_flatten__"):
            yield from plain_tensors({f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]})
        else:
            yield name, value


def _quanto(peer: Peer, transformer: nn.Module, layers: Collection[str]) -> None:
    quanto = import_module("optimum.quanto")
    quanto.quantize(transformer, include=list(layers), **peer.values(quanto))
    quanto.freeze(transformer)


def _torchao(peer: Peer, transformer: nn.Module, layers: Collection[str]) -> None:
    module, library = import_module(peer.module), import_module("torchao.quantization")
    config = getattr(module, peer.config)(**peer.values(library))
    library.quantize_(transformer, config, filter_fn=lambda _, name: name in layers)


def _sdnq(peer: Peer, transformer: nn.Module, layers: Collection[str]) -> None:
    # add_skip_keys would leave layers out by the library's own list of names; here both lists are ours, and the same for everyone.
    others = [f"{name}.weight" for name, part in transformer.named_modules() if isinstance(part, nn.Linear) and name not in layers]
    import_module("sdnq").sdnq_post_load_quant(transformer, add_skip_keys=False, modules_to_not_convert=others, **peer.options)


CALLS: dict[str, Callable[[Peer, nn.Module, Collection[str]], None]] = {"optimum-quanto": _quanto, "torchao": _torchao, "sdnq": _sdnq}


def _group(size: int) -> Named:
    return Named("PerGroup", (size,))


def _weights4(size: int, what: str = "", **options: Any) -> Peer:
    return Peer("torchao", f"int4 weights{what}", size, {"group_size": size} | options, "Int4WeightOnlyConfig")


def _opaque4(size: int, what: str, **options: Any) -> Peer:
    note = "a prototype of the library's for CPUs"
    return Peer("torchao", f"int4 weights, opaque{what}", size, {"group_size": size} | options, "PrototypeInt4WeightOnlyConfig", INT4, note)


def _intx(size: int, what: str, **options: Any) -> Peer:
    options = {"weight_dtype": Named("torch.int4"), "granularity": _group(size)} | options
    return Peer("torchao", f"int4 weights, intx{what}", size, options, "IntxWeightOnlyConfig", note="a byte for each code; see bytes_if_packed")


def _act_intx(size: int, what: str = "", **options: Any) -> Peer:
    options = {"weight_dtype": Named("torch.int4"), "weight_granularity": _group(size)} | options
    note = "a byte for each code; see bytes_if_packed. Activations are quantized and dequantized, arithmetic is floating-point"
    return Peer("torchao", f"int8 activations, int4 weights, intx{what}", size, options, "Int8DynamicActivationIntxWeightConfig", note=note)


def _sd(what: str, dtype: str, group: int | None = None, size: int = 0, **options: Any) -> Peer:
    """`group` is what `size` comes to: 0 lets the library choose."""
    return Peer("sdnq", what, group, {"weights_dtype": dtype, "group_size": size} | options)


STATIC = (
    "not run: activations are quantized with static scales, one a tensor, which need calibration (with optimum.quanto.Calibration); "
    "uncalibrated they are the range [-1, 1]. The diffusers integration quantizes weights only"
)
HQQ = {"int4_choose_qparams_algorithm": "hqq"}

PEERS = (
    Peer("optimum-quanto", "qint8 weights", None, {"weights": Named("qint8")}),
    Peer("optimum-quanto", "qint4 weights", 128, {"weights": Named("qint4")}, note="the library has no other group size"),
    Peer("optimum-quanto", "qint4 weights, HQQ", 128, {"weights": Named("qint4"), "optimizer": Named("HqqOptimizer", ())}),
    Peer("optimum-quanto", "qint8 activations, qint8 weights", None, {"weights": Named("qint8"), "activations": Named("qint8")}, declined=STATIC),
    Peer("torchao", "int8 weights", None, {}, "Int8WeightOnlyConfig"),
    Peer("torchao", "int8 weights", 128, {"granularity": _group(128)}, "Int8WeightOnlyConfig"),
    _weights4(128),
    _weights4(128, ", tile_packed_to_4d", int4_packing_format="tile_packed_to_4d"),
    _weights4(128, ", tile_packed_to_4d, HQQ", int4_packing_format="tile_packed_to_4d", **HQQ),
    _weights4(128, ", preshuffled", int4_packing_format="preshuffled"),
    _weights4(128, ", plain_int32", int4_packing_format="plain_int32"),
    *(_opaque4(size, "") for size in (128, 64)),
    _opaque4(128, ", HQQ", **HQQ),
    *(_intx(size, "") for size in (128, 64)),
    Peer("torchao", "int8 activations, int8 weights", None, {}, "Int8DynamicActivationInt8WeightConfig"),
    Peer("torchao", "int8 activations, int4 weights, CPU kernel", 128, {"group_size": 128}, "Int8DynamicActivationInt4WeightConfig", INT4),
    *(_act_intx(size) for size in (128, 64)),
    _act_intx(128, ", asymmetric", weight_mapping_type=Named("MappingType.ASYMMETRIC")),
    _act_intx(128, ", packed", intx_packing_format="opaque_torchao_auto"),
    _sd("int8", "int8"),
    _sd("int8, quantized matmul", "int8", use_quantized_matmul=True),
    *(_sd("int4", "int4", size, size) for size in (128, 64)),
    *(_sd("uint4", "uint4", size, size) for size in (128, 64)),
    *(_sd("uint4, hadamard", "uint4", size, size, use_hadamard=True) for size in (128, 64)),
    *(_sd("uint4, svd", "uint4", size, size, use_svd=True) for size in (128, 64)),
    _sd("uint4, hadamard, svd", "uint4", 128, 128, use_hadamard=True, use_svd=True),
    _sd("uint4, quantized matmul", "uint4", 128, 128, use_quantized_matmul=True),
    _sd("uint4, svd, quantized matmul", "uint4", 128, 128, use_svd=True, use_quantized_matmul=True),
    _sd("uint4, codebook", "uint4", 512, 0, use_codebook=True),
)
