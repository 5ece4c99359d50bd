"""Codecs of residuals: what a rank sends instead of activations that its peers nearly know already. The exact reference of every faster codec.

    d = x − ref;   payload = C(d);   ref ← ref + D(payload)        the same on the sender and on every receiver, so that errors don't accumulate

Groups of 64 along the last dimension, c ≤ 64 elements each (the last may be short); a = max |d| over the group, s its fp16 scale:

    kind   s                   code                                  D(code)            bytes a group
    int8   above(a / 127)      clamp(round(d · (1/s)), ±127) + 128   (code − 128) · s   66
    int4   above(a / 7)        clamp(round(d · (1/s)), ±7) + 8       (code − 8) · s     34
    int2   near(√(Σ d² / c))   [d ≥ −t·s] + [d ≥ 0] + [d ≥ t·s]      LEVELS[code] · s   18   Lloyd-Max for a normal d (Max 1960)
    int1   near(Σ |d| / c)     [d ≥ 0]                               ±s                 10   sign and mean (signSGD, arXiv 1802.04434)

`near` is the nearest fp16 number, `above` the next one that is not smaller, so that |d − D| ≤ s / 2. Codes are packed little-endian (code 0 in the
low bits) and a short group is filled up with the codes of d = 0.

Numerics: fp32, each operation rounded once, to even; no fused multiply-add may replace a product and a sum. Then any implementation can give the
same bytes, and the state of two ranks can be compared by hash. A sum of floats would depend on its order, so sums are over integers:

    r = 2^b / max(a, 2^-40);   q = round(|d| · r);   Σ |d| / c := Σ q / (r·c);   √(Σ d² / c) := √(Σ q² / c) / r        b = 15 for int1, 12 for int2

An all-zero group has s = 0, and adds zero. A group with NaN or inf has s = NaN and the codes of d = 0: it poisons its own 64 elements on every rank,
and no others; NaN is always written as torch.nan's bits. s saturates at 65504. LEVELS and t have so few bits that LEVELS·s and t·s are exact.

Second order: what changed last predicts what changes next, damped by β, which every rank knows. The reference is then compared where it is expected:

    p = ref + β·delta;   d = x − p;   new = p + D(C(d))        delta ← new − ref;   ref ← new

`new` is rounded once to ref's dtype before delta is taken from it, and delta once to the same dtype.
"""

from typing import NamedTuple

import torch

from dite_kernels import affine

GROUP = 64
BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
SUM_BITS = {"int2": 12, "int1": 15}
SMALLEST = 2.0**-40
LEVELS = (-1.5078125, -0.453125, 0.453125, 1.5078125)
THRESHOLD = 0.98046875


class Payload(NamedTuple):
    """codes uint8 [..., G · 8 · bits]; scale fp16 [..., G]."""

    codes: torch.Tensor
    scale: torch.Tensor


class Prediction(NamedTuple):
    """How the reference is expected to move on: beta fp32 [B], one for each leading index (one in all without leading dimensions); delta like the
    reference [B, ..., n], of its dtype: the last change."""

    beta: torch.Tensor
    delta: torch.Tensor

    def check(self, ref: torch.Tensor) -> None:
        """Raise ValueError unless it belongs to `ref`."""
        if self.delta.shape != ref.shape or self.delta.dtype != ref.dtype:
            found, wanted = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (self.delta, ref))
            raise ValueError(f"delta is {found} and its reference {wanted}; they must agree")
        samples = (ref.shape[0] if ref.ndim > 1 else 1,)
        if self.beta.shape != samples or self.beta.dtype != torch.float32:
            raise ValueError(f"beta is {self.beta.dtype} {tuple(self.beta.shape)}; a reference of {tuple(ref.shape)} needs torch.float32 {samples}")

    def of(self, ref: torch.Tensor) -> torch.Tensor:
        """p, fp32 like `ref`."""
        self.check(ref)
        beta = self.beta.view(-1, *[1] * (ref.ndim - 1))
        return ref.float() + beta * self.delta.float()


def payload_shapes(shape: torch.Size | tuple[int, ...], kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `codes` and `scale` for a residual of `shape`.

    >>> payload_shapes((2, 100), "int4")
    ((2, 64), (2, 2))
    """
    if kind not in BITS:
        raise ValueError(f"no codec named {kind}; use {', '.join(BITS)}")
    groups = affine.group_count(shape[-1], GROUP)
    return (*shape[:-1], groups * GROUP * BITS[kind] // 8), (*shape[:-1], groups)


def encode(x: torch.Tensor, ref: torch.Tensor, kind: str, prediction: Prediction | None = None) -> Payload:
    """What `x` [..., n] adds to `ref` [..., n], or to where `prediction` expects it, compressed. Their dtypes may differ. Neither is changed: pass
    the payload to `decode_add_`, as every receiver does. Raises ValueError for shapes that don't agree and kinds that don't exist."""
    if x.shape != ref.shape:
        raise ValueError(f"x is {tuple(x.shape)} and its reference {tuple(ref.shape)}; they must agree")
    code_shape, scale_shape = payload_shapes(x.shape, kind)
    d = _groups(x.float() - (prediction.of(ref) if prediction else ref.float()))
    largest = d.abs().amax(-1)
    finite = largest.isfinite()
    d, largest = torch.where(finite[..., None], d, 0.0), torch.where(finite, largest, 0.0)
    scale = _to_half(_scale(d, largest, x.shape[-1], kind), upwards=kind in ("int8", "int4"))
    codes = _codes(d, scale.float()[..., None], kind)
    scale = torch.where(finite, scale, torch.nan)
    return Payload(_pack(codes, BITS[kind]).reshape(code_shape), scale.reshape(scale_shape))


def decode(payload: Payload, columns: int, kind: str) -> torch.Tensor:
    """D(payload), fp32 [..., columns]."""
    scale = payload.scale.float()
    codes = _unpack(payload.codes, BITS[kind]).unflatten(-1, (-1, GROUP))
    if kind in ("int8", "int4"):
        values = codes.float() - 2 ** (BITS[kind] - 1)
    else:
        table = torch.tensor(LEVELS if kind == "int2" else (-1.0, 1.0), device=scale.device)
        values = table[codes.long()]
    return (values * scale[..., None]).flatten(-2)[..., :columns]


def decode_add_(ref: torch.Tensor, payload: Payload, kind: str, prediction: Prediction | None = None) -> None:
    """ref ← ref + D(payload), added in fp32 and rounded once to ref's dtype. With `prediction` it is added to p, and delta ← the change of ref."""
    before = prediction.of(ref) if prediction else ref.float()
    new = (before + decode(payload, ref.shape[-1], kind)).to(ref.dtype)
    if prediction:
        _write(prediction.delta, new.float() - ref.float())
    _write(ref, new)


def _write(to: torch.Tensor, value: torch.Tensor) -> None:
    """Rounded to its dtype; one NaN for all, which conversions don't agree on even within a tensor."""
    to.copy_(value).masked_fill_(value.isnan(), torch.nan)


def _groups(d: torch.Tensor) -> torch.Tensor:
    """[..., n] → [rows, G, 64], zeros at the end."""
    rows = d.reshape(-1, d.shape[-1])
    padding = -rows.shape[1] % GROUP
    return torch.nn.functional.pad(rows, (0, padding)).unflatten(1, (-1, GROUP))


def _scale(d: torch.Tensor, largest: torch.Tensor, columns: int, kind: str) -> torch.Tensor:
    """The scale fp32 [rows, G] of each group before it is rounded to fp16."""
    if kind in ("int8", "int4"):
        return largest / torch.full_like(largest, 2 ** (BITS[kind] - 1) - 1)  # by a tensor: CUDA divides by a number as a multiplication
    count = (columns - GROUP * torch.arange(d.shape[1], device=d.device)).clamp(max=GROUP).float()
    step = torch.full_like(largest, 2.0 ** SUM_BITS[kind]) / largest.clamp(min=SMALLEST)
    q = (d.abs() * step[..., None]).round().to(torch.int32)
    if kind == "int2":
        return ((q * q).sum(-1, dtype=torch.int32).float() / count).sqrt() / step
    return q.sum(-1, dtype=torch.int32).float() / (step * count)


def _to_half(scale: torch.Tensor, upwards: bool) -> torch.Tensor:
    scale = scale.clamp(max=affine.FP16_MAX)
    half = scale.half()
    # The bits of positive halves are ordered like the numbers: adding one gives the next larger.
    return torch.where(half.float() < scale, (half.view(torch.int16) + 1).view(torch.float16), half) if upwards else half


def _codes(d: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """uint8 codes like `d`."""
    if kind == "int1":
        return (d >= 0).to(torch.uint8)
    if kind == "int2":
        edge = scale * THRESHOLD
        return (d >= -edge).to(torch.uint8) + (d >= 0).to(torch.uint8) + (d >= edge).to(torch.uint8)
    most = 2 ** (BITS[kind] - 1) - 1
    inverse = torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)
    return ((d * inverse).clamp(-most, most).round() + (most + 1)).to(torch.uint8)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    parts = codes.unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
