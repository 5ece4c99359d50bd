"""What a packet's body can be, by name. Each codec writes what `x` adds to a prediction, and adds what it reads to the same prediction.

    name        body of a tensor [B, l, C]                                              bytes a value
    none        the values themselves, in the model's dtype                             2 or 4
    int8 … int1 codes in groups of 64 along C with fp16 scales: dite_kernels.codec      1.03, 0.53, 0.28, 0.16
    lowrank-R   d ≈ P·Qᵀ, rank R, one power step from a fixed sketch (PowerSGD)         2·R·(1/C + 1/(B·l))
    topk-K      of each row the C/K largest |d|, fp16 with 16-bit places                4/K

All arithmetic is fp32, each operation rounded once, and every sum that a receiver repeats has one order: all ranks decode to the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch

from dite.errors import UsageError
from dite.parallel.rates import parse_codec, payload_bytes
from dite_kernels import codec as kernels
from dite_kernels import residual

MOST_COLUMNS = 2**16


@dataclass
class Reference:
    """What the receivers of a tensor [B, l, C] hold of it, and how it changed last; both in the model's dtype, and `value` perhaps a strided view."""

    value: torch.Tensor
    delta: torch.Tensor | None = None

    def clear_(self) -> None:
        """Forget: the next packet stands alone."""
        self.value.zero_()
        if self.delta is not None:
            self.delta.zero_()


class Codec(ABC):
    """One way to write a body. `number` goes into headers."""

    name: str
    number: int
    lossless = False

    def body_bytes(self, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
        """Length for a tensor of `shape` [B, l, C]."""
        return payload_bytes(self.name, *_rows(shape), dtype.itemsize)

    @abstractmethod
    def encode(self, x: torch.Tensor, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> bool:
        """Write into `body` (uint8) what `x` adds to base.value + beta · base.delta; `beta` fp32 [B]. Returns whether x is finite."""

    @abstractmethod
    def decode_(self, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> None:
        """Bring `base` up to date."""


class Raw(Codec):
    """The values themselves."""

    name, number, lossless = "none", 0, True

    def encode(self, x: torch.Tensor, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> bool:
        _typed(body, x.dtype).view(x.shape).copy_(x)
        return bool(x.sum(dtype=torch.float32).isfinite())

    def decode_(self, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> None:
        new = _typed(body, base.value.dtype).view(base.value.shape)
        if base.delta is not None:
            base.delta.copy_(new.float() - base.value.float())
        base.value.copy_(new)


class Grouped(Codec):
    """int8, int4, int2 and int1 of dite_kernels."""

    def __init__(self, name: str):
        self.name = name
        self.number = 1 + list(kernels.BITS).index(name)

    def encode(self, x: torch.Tensor, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> bool:
        payload = self._payload(body, x.shape)
        residual.encode(x, base.value, self.name, _prediction(base, beta), payload)
        # A group that isn't finite has no finite scale: exponent bits all set.
        return not bool(((payload.scale.view(torch.int16) & 0x7C00) == 0x7C00).any())

    def decode_(self, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> None:
        residual.decode_add_(base.value, self._payload(body, base.value.shape), self.name, _prediction(base, beta))

    def _payload(self, body: torch.Tensor, shape: torch.Size) -> kernels.Payload:
        codes, scale = kernels.payload_shapes(tuple(shape), self.name)
        split = _count(codes)
        return kernels.Payload(body[:split].view(codes), _typed(body[split:], torch.float16).view(scale))


class LowRank(Codec):
    """P [B·l, R] and Q [C, R] in fp16: one power step from a fixed random sketch, P orthonormal."""

    def __init__(self, rank: int):
        self.rank = rank
        self.name, self.number = f"lowrank-{rank}", 16

    def encode(self, x: torch.Tensor, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> bool:
        rows, columns = _rows(x.shape)
        rank = self._rank(x.shape)
        d = (x.float() - _predicted(base, beta)).reshape(rows, columns)
        finite = bool(d.sum().isfinite())
        p, q = torch.full((rows, rank), torch.nan), torch.full((columns, rank), torch.nan)
        if finite:
            p, _ = torch.linalg.qr(d @ _sketch(columns, rank).to(d.device))
            q = d.T @ p
        parts = _typed(body, torch.float16)
        parts[: rows * rank].view(rows, rank).copy_(p)
        parts[rows * rank :].view(columns, rank).copy_(q.clamp(-65504, 65504))
        return finite

    def decode_(self, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> None:
        rows, columns = _rows(base.value.shape)
        rank = self._rank(base.value.shape)
        parts = _typed(body, torch.float16).float()
        p, q = parts[: rows * rank].view(rows, rank), parts[rows * rank :].view(columns, rank)
        d = torch.zeros(rows, columns, device=p.device)
        for i in range(rank):  # one after another: a matrix product's order of summing depends on the machine
            d += p[:, i : i + 1] * q[:, i]
        _add_(base, beta, d.view(base.value.shape))

    def _rank(self, shape: tuple[int, ...] | torch.Size) -> int:
        return min(self.rank, *_rows(shape))


class TopK(Codec):
    """Of each row the columns / K largest changes."""

    def __init__(self, one_in: int):
        self.one_in = one_in
        self.name, self.number = f"topk-{one_in}", 17

    def encode(self, x: torch.Tensor, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> bool:
        d = (x.float() - _predicted(base, beta)).flatten(0, 1)
        places = d.abs().topk(self._kept(x.shape), dim=1).indices
        values = d.gather(1, places)
        parts = body.view(2, -1)
        _typed(parts[0], torch.float16).view(places.shape).copy_(values.clamp(-65504, 65504))
        _typed(parts[1], torch.int16).view(places.shape).copy_(places - (places >= 2**15) * 2**16)
        return bool(d.sum().isfinite())

    def decode_(self, base: Reference, beta: torch.Tensor | None, body: torch.Tensor) -> None:
        rows, columns = _rows(base.value.shape)
        parts = body.view(2, -1)
        values = _typed(parts[0], torch.float16).view(rows, -1).float()
        places = (_typed(parts[1], torch.int16).view(rows, -1).long() % 2**16).clamp(max=columns - 1)
        _add_(base, beta, torch.zeros(rows, columns, device=values.device).scatter_(1, places, values).view(base.value.shape))

    def _kept(self, shape: tuple[int, ...] | torch.Size) -> int:
        if shape[-1] > MOST_COLUMNS:
            raise UsageError(f"{self.name} can't carry rows of {shape[-1]} values", f"places have 16 bits: at most {MOST_COLUMNS}", "use int4")
        return max(1, shape[-1] // self.one_in)


@cache
def codec(name: str) -> Codec:
    """The codec of that name. Raises UsageError.

    >>> codec("int4").body_bytes((2, 8, 100), torch.float32)
    1088
    """
    kind, number = parse_codec(name)
    if kind == Raw.name:
        return Raw()
    return LowRank(number) if kind == "lowrank" else TopK(number) if kind == "topk" else Grouped(kind)


def _prediction(base: Reference, beta: torch.Tensor | None) -> kernels.Prediction | None:
    return None if beta is None or base.delta is None else kernels.Prediction(beta, base.delta)


def _predicted(base: Reference, beta: torch.Tensor | None) -> torch.Tensor:
    """fp32 value + beta · delta."""
    value = base.value.float()
    return value if beta is None or base.delta is None else value + beta[:, None, None] * base.delta.float()


def _add_(base: Reference, beta: torch.Tensor | None, d: torch.Tensor) -> None:
    new = (_predicted(base, beta) + d).to(base.value.dtype)
    if base.delta is not None:
        base.delta.copy_(new.float() - base.value.float())
    base.value.copy_(new)


@cache
def _sketch(columns: int, rank: int) -> torch.Tensor:
    return torch.randn(columns, rank, generator=torch.Generator().manual_seed(0))


def _typed(body: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as values; they must lie as the dtype wants, which bodies of even length after a header of 48 do."""
    return body.view(dtype)


def _rows(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    return _count(shape[:-1]), shape[-1]


def _count(shape: tuple[int, ...] | torch.Size) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
