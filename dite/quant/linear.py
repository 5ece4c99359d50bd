"""The quantized linear layer: packed codes on disk and in memory, integers in its arithmetic.

Everything it holds is a buffer: some diffusers models read `next(module.parameters()).dtype`, which must not find integers. It subclasses
`nn.Linear`, so that code which looks for linears finds it; its `weight` has a shape, a dtype and a device, and no numbers. Casting the model
(`.bfloat16()`, `.to(dtype)`) casts the bias and leaves the scales as they were stored: a scale cast to bf16 is off by up to 0.4%.

Codes don't train. Gradients pass to the input, whatever the backend, as if activations were not rounded (straight-through):

    ∂L/∂x = ∂L/∂y · Ŵ        Ŵ the dequantized weight; exact for weight-only layers
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dite.errors import QuantizationError, UnsupportedEnvironment, UsageError, did_you_mean
from dite.quant.scheme import LayerScheme
from dite.quant.standin import WeightStandIn
from dite.quant.transforms import LARGEST, SMALLEST
from dite_kernels import backends
from dite_kernels.hadamard import rotate, signs
from dite_kernels.packing import packed_columns
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight

Quantize = Callable[[torch.Tensor, LinearSpec], QuantTensor]


@dataclass(frozen=True)
class Prepared:
    """What a backend made of a layer's weight, for which dtype, device and buffers (`key`), and the transform it does itself, if any."""

    key: tuple
    backend: backends.Backend
    weight: Any
    transform: backends.InputTransform | None


class QuantLinear(nn.Linear):
    """y = x·Wᵀ + b with W in integer codes and x quantized at each call; input [..., K], output [..., N] in the input's dtype.

    Where the scheme says so, x is first scaled by `smooth` and rotated (`dite_kernels.hadamard`), and the codes are those of the weight changed the
    other way; then x·downᵀ·upᵀ is added, with x in that basis but not quantized.

    Buffers: qdata uint8 [N, packed K]; scale [N, G] fp16 or fp32; zero_point uint8 [N, packed G] unless symmetric; bias [N] or None; smooth [K],
    lowrank_down [r, K] and lowrank_up [N, r] if the scheme has them, in the model's dtype (smooth holds numbers that every dtype can).
    `backend` names what runs it (`auto` by default); see `dite_kernels.backends`. Some hold the codes in a layout of their own; then the layer has no
    second copy, and `qdata` is made from it whenever it is asked for.
    """

    def __init__(self, in_features: int, out_features: int, scheme: LayerScheme, bias: bool = True, *, device=None, dtype=None):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.spec = linear_spec(in_features, out_features, scheme)
        self.backend = "auto"
        self._prepared: Prepared | None = None
        self._lock = threading.RLock()  # codes change hands between the layer and a backend
        self._sign: torch.Tensor | None = None
        bits, groups = scheme.weight.num_bits, self.spec.groups
        self._dtype = dtype or torch.get_default_dtype()
        self.register_buffer("qdata", torch.zeros(out_features, packed_columns(in_features, bits), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=torch.float16, device=device))
        zero_point = None if scheme.weight.symmetric else torch.zeros(out_features, packed_columns(groups, bits), dtype=torch.uint8, device=device)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)
        rank = scheme.rank
        self.register_buffer("smooth", torch.ones(in_features, device=device, dtype=dtype) if scheme.transform.smooths else None)
        self.register_buffer("lowrank_down", torch.zeros(rank, in_features, device=device, dtype=dtype) if rank else None)
        self.register_buffer("lowrank_up", torch.zeros(out_features, rank, device=device, dtype=dtype) if rank else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: LayerScheme,
        name: str = "layer",
        quantize: Quantize = quantize_weight,
        smooth: torch.Tensor | None = None,
        factor: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> "QuantLinear":
        """Quantize a linear's weight in the scheme's basis by `quantize(weight, spec)`: rounding to nearest unless given.

        `smooth` [K] multiplies inputs (see `transforms.representable`); `factor(weight, rank)` gives (down, up) for a scheme with a low-rank part.
        Raises QuantizationError that names the layer if the weight holds NaN or inf.
        """
        weight = linear.weight.detach()
        layer = cls(linear.in_features, linear.out_features, scheme, linear.bias is not None, device=weight.device, dtype=weight.dtype)
        changed = weight
        if scheme.transform.smooths:
            layer.smooth = smooth.to(weight.device, weight.dtype)
            changed = changed.float() / smooth.float()
        if scheme.transform.rotates:
            changed = layer._rotated(changed.float())
        if scheme.rank:
            layer.lowrank_down, layer.lowrank_up = (part.to(weight.dtype) for part in factor(changed.float(), scheme.rank))
            changed = changed.float() - layer.lowrank_up.float() @ layer.lowrank_down.float()
        layer.tensor = quantize(changed, layer.spec)
        if not torch.isfinite(layer.scale).all():
            cls.check_weight(linear, name)
            raise QuantizationError(f"layer {name} can't be quantized", "its weights are so large that a scale overflows", "repair the checkpoint")
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        return layer.train(linear.training)

    @staticmethod
    def check_weight(linear: nn.Linear, name: str) -> None:
        """Raise QuantizationError unless every weight is finite."""
        # The extremes carry any NaN or inf, in one pass; counting is for the message.
        if not torch.isfinite(torch.stack(torch.aminmax(linear.weight.detach()))).all():
            bad = linear.weight.numel() - int(torch.isfinite(linear.weight).sum())
            why = f"{bad} of its {linear.weight.numel()} weights are NaN or inf"
            raise QuantizationError(
                f"layer {name} can't be quantized",
                why,
                f"repair the checkpoint, or skip the layer: --set 'layers={{\"{name}\": {{skip: not finite}}}}'",
            )

    @property
    def qdata(self) -> torch.Tensor:
        """The packed codes, uint8 [N, packed K]: a copy while a backend holds them, when `buffers()` has an empty one on the meta device. Assign
        `tensor` to change them."""
        return self.tensor.qdata

    @property
    def weight(self) -> WeightStandIn:
        """What the weight looks like: [N, K], the layer's dtype and device. See `dequantize` for its values."""
        return WeightStandIn((self.out_features, self.in_features), self._dtype if self.bias is None else self.bias.dtype, self.scale.device)

    @property
    def tensor(self) -> QuantTensor:
        """The packed weight."""
        if "qdata" not in self._buffers:
            raise AttributeError("qdata")  # while the layer is being built
        with self._lock:
            if self._holds_codes:
                return self._prepared.backend.restore(self._prepared.weight, self.spec)
            return QuantTensor(self._buffers["qdata"], self.scale, self.zero_point)

    @tensor.setter
    def tensor(self, value: QuantTensor) -> None:
        with self._lock:
            self._prepared = None
            self._buffers["qdata"], self.scale, self.zero_point = value.qdata, value.scale, value.zero_point

    def validate_parts(self) -> None:
        """Raise ValueError unless smooth scales are positive, and no larger than any dtype holds, and low-rank factors are floats."""
        for name in ("smooth", "lowrank_down", "lowrank_up"):
            part = getattr(self, name)
            if part is not None and not part.is_floating_point():
                raise ValueError(f"{name} is {part.dtype}; it must be a float")
        if self.smooth is not None and not ((self.smooth >= SMALLEST) & (self.smooth <= LARGEST)).all():
            raise ValueError(f"smooth holds values outside {SMALLEST:g} to {LARGEST:g}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] that the layer stands for, in the basis of its input."""
        transform = self.scheme.transform
        if transform.kind == "none" and self.lowrank_up is None:
            return self.tensor.dequantize(self.spec, dtype)
        weight = self.tensor.dequantize(self.spec)
        if self.lowrank_up is not None:
            weight = weight + self.lowrank_up.float() @ self.lowrank_down.float()
        if transform.rotates:
            sign = self._signs(weight)
            weight = rotate(weight, transform.block)
            weight = weight if sign is None else weight * sign
        return (weight if self.smooth is None else weight * self.smooth.float()).to(dtype)

    def transformed(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] in the basis that the codes are in, in x's dtype."""
        x = x if self.smooth is None else x * self.smooth.to(x.dtype)
        return self._rotated(x) if self.scheme.transform.rotates else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        y = StraightThrough.apply(rows, self) if torch.is_grad_enabled() and x.requires_grad else self._linear(rows)
        return y.reshape(*x.shape[:-1], self.out_features)

    def forward_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """gelu(forward(x)), by its tanh approximation; in one pass, and rounded to x's dtype once, where the backend can."""
        alone = self.lowrank_up is None and not (torch.is_grad_enabled() and x.requires_grad)
        rows = x.reshape(-1, self.in_features)
        if not alone or not self._prepare(rows).backend.gelus:
            return F.gelu(self(x), approximate="tanh")
        return self._linear(rows, gelu=True).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        weight, activation = self.scheme.weight, self.scheme.activation
        inputs = f"A{activation.num_bits} per {activation.granularity}" if activation else "weight-only"
        inputs += f", {self.scheme.transform.kind}" if self.scheme.transform.kind != "none" else ""
        inputs += f", rank {self.scheme.rank}" if self.scheme.rank else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, W{weight.num_bits} g{weight.group_size or 'all'}, {inputs}"

    def _linear(self, x_MK: torch.Tensor, **fused: bool) -> torch.Tensor:
        ready = self._prepare(x_MK)
        if ready.transform is not None:
            return ready.backend.linear(x_MK, ready.weight, self.bias, self.spec, ready.transform, **fused)
        x_MK = self.transformed(x_MK)
        y = ready.backend.linear(x_MK, ready.weight, self.bias, self.spec, **fused)
        if self.lowrank_up is not None:
            y = y + F.linear(F.linear(x_MK, self.lowrank_down.to(x_MK.dtype)), self.lowrank_up.to(x_MK.dtype))
        return y

    def _prepare(self, x_MK: torch.Tensor) -> "Prepared":
        return self._ready(x_MK) or self._prepare_anew(x_MK)

    @torch.compiler.disable  # it happens once, in Python and in C
    def _prepare_anew(self, x_MK: torch.Tensor) -> "Prepared":
        with self._lock:
            ready = self._ready(x_MK)
            if ready is not None:  # another thread was quicker
                return ready
            self.unprepare()
            backend = select_backend(self.spec, x_MK.device, self.backend, len(x_MK))
            weight = backend.prepare(self.tensor, self.spec, x_MK.dtype)
            transform = self._input_transform() if backend.transforms and self.lowrank_up is None else None
            codes = self._buffers["qdata"]
            kept = codes.to("meta") if backend.holds_codes else codes
            ready = Prepared(self._key(x_MK, backend, kept), backend, weight, transform)
            self._prepared, self._buffers["qdata"] = ready, kept  # last of all: whatever is raised before loses nothing
        return ready

    def _ready(self, x_MK: torch.Tensor) -> "Prepared | None":
        ready = self._prepared
        return ready if ready is not None and ready.key == self._key(x_MK, ready.backend) else None

    def _key(self, x_MK: torch.Tensor, backend: backends.Backend, qdata: torch.Tensor | None = None) -> tuple:
        """What a prepared weight depends on."""
        buffers = (qdata if qdata is not None else self._buffers["qdata"], self.scale, self.zero_point, self.smooth)
        dtype = None if backend.holds_codes else x_MK.dtype
        return (self.backend, dtype, x_MK.device, 1 if backends.many_floats(self.spec, len(x_MK)) else 0, *map(id, buffers))

    def unprepare(self) -> None:
        """Forget what a backend has prepared; the next call prepares anew."""
        with self._lock:
            if self._holds_codes:
                self._buffers["qdata"] = self.qdata
            self._prepared = None

    @property
    def _holds_codes(self) -> bool:
        return self._prepared is not None and self._prepared.backend.holds_codes and self._buffers["qdata"].is_meta

    def _input_transform(self) -> backends.InputTransform | None:
        """What `transformed` does, for backends that do it themselves; None where it does nothing."""
        transform = self.scheme.transform
        if transform.kind == "none":
            return None
        smooth = None if self.smooth is None else self.smooth.float().contiguous()
        sign = self._signs(torch.empty(0, dtype=torch.float32, device=self.scale.device)) if transform.rotates else None
        return backends.InputTransform(smooth, sign, transform.block if transform.rotates else None)

    def __getstate__(self):
        with self._lock:  # copies and pickles prepare their own, and have their own buffers
            self.unprepare()
            return self.__dict__ | {"_sign": None, "_lock": None, "_buffers": self._buffers.copy()}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._lock = threading.RLock()

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        return rotate(x, self.scheme.transform.block, self._signs(x))

    def _signs(self, x: torch.Tensor) -> torch.Tensor | None:
        """±1 [K] like `x`, kept between calls; None for a rotation without signs."""
        seed = self.scheme.transform.sign_seed
        if seed is None:
            return None
        if self._sign is None or self._sign.device != x.device or self._sign.dtype != x.dtype:
            self._sign = signs(self.in_features, seed).to(x.device, x.dtype)
        return self._sign

    def _apply(self, fn, recurse=True):
        self.unprepare()
        scale = self.scale
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = torch.empty_like(scale, device=self.scale.device) if scale.is_meta else scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with self._lock:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "qdata"] = self.qdata

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.unprepare()
        # copy_ would cast stored fp32 scales to this buffer's fp16; take the stored dtype instead.
        stored = state_dict.get(prefix + "scale")
        if stored is not None and stored.dtype != self.scale.dtype:
            self.scale = self.scale.to(stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


class StraightThrough(torch.autograd.Function):
    """A quantized linear whose gradient is that of the same linear on activations that were not rounded. It keeps no activations."""

    @staticmethod
    def forward(ctx, x_MK: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer._linear(x_MK)

    @staticmethod
    def backward(ctx, grad_MN: torch.Tensor):
        return grad_MN @ ctx.layer.dequantize(grad_MN.dtype), None


def linear_spec(in_features: int, out_features: int, scheme: LayerScheme) -> LinearSpec:
    """A scheme in the kernels' terms."""
    activation = scheme.activation
    return LinearSpec(
        in_features=in_features,
        out_features=out_features,
        weight_bits=scheme.weight.num_bits,
        group_size=scheme.weight.group_size,
        weight_symmetric=scheme.weight.symmetric,
        activation_bits=activation.num_bits if activation else None,
        activation_per_group=bool(activation and activation.granularity == "group"),
        activation_symmetric=bool(activation and activation.symmetric),
    )


def select_backend(spec: LinearSpec, device: torch.device, name: str, tokens: int | None = None) -> backends.Backend:
    """`dite_kernels.backends.select` with our own error."""
    try:
        return backends.select(spec, device, None if name == "auto" else name, tokens)
    except backends.BackendUnavailable as error:
        raise UnsupportedEnvironment("the backend can't run this model here", str(error), "see `dite doctor`, or leave backend at auto") from error


def set_backend(model: nn.Module, name: str) -> None:
    """Choose what runs every quantized linear of `model`.

    Raises UsageError for an unknown name, UnsupportedEnvironment if a layer can't use it; then nothing changes.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if name not in ("auto", *backends.BACKENDS):
        known = ["auto", *backends.BACKENDS]
        raise UsageError(f"no backend named {name}", f"known: {', '.join(known)}", did_you_mean(name, known) or "see `dite doctor`")
    for layer in layers:
        select_backend(layer.spec, layer.scale.device, name)
    for layer in layers:
        layer.unprepare()
        layer.backend = name
