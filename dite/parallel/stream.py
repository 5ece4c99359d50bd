"""ResidualStream: what one rank sends of one tensor, step after step, and what all of its receivers therefore know of it.

    d = x − (ref + β·Δ);   packet = C(d);   ref' ← ref + β·Δ + D(packet);   Δ ← ref' − ref        on the sender and on every receiver

order 0 sends x itself (ref = 0), order 1 the change (β = 0), order 2 what a straight line through the last two does not foretell. β is one byte for
each sample in the packet, in sixteenths: a fixed damping, or (adaptive) the one that fits some of the tokens best, computed by the sender, so that
ranks on unlike machines cannot disagree about it. The reference changes by decoding only, on the sender too; so it is the same bits everywhere, and a
digest of it, sent every fourth step, proves that.

The first packet of a request, and of a tensor of another shape, is a keyframe: order 0, int8.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch

from dite.errors import ExchangeCorrupted, NonFiniteOutput, UsageError
from dite.parallel.codecs import Codec, Reference, codec
from dite.parallel.packet import DIGEST, HEADER_BYTES, KEYFRAME, NONFINITE, Header, open_packet, seal
from dite.parallel.rates import KEYFRAME_CODEC

ADAPTIVE = "adaptive"
DIGEST_EVERY = 4
BETA_STEPS = 16
FITTED = 2**16  # values of a sample, about, from which β is fitted
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Predictor:
    """`order` 0, 1 or 2; `damping` of order 2: a number from 0 to 1, in sixteenths, or "adaptive"."""

    order: int = 2
    damping: float | str = ADAPTIVE

    def __post_init__(self):
        if self.order not in (0, 1, 2):
            rule = "0 sends values, 1 their change, 2 what a straight line doesn't foretell"
            raise UsageError(f"no residual order {self.order}", rule, "use 0, 1 or 2")
        if self.damping != ADAPTIVE and not (isinstance(self.damping, float | int) and 0 <= self.damping <= 1):
            raise UsageError(f"damping {self.damping!r} can't be used", "it is a number from 0 to 1, or adaptive", "use adaptive")


@dataclass(frozen=True)
class Moment:
    """Which call of the model this is: of which request (epoch), of which guidance branch, the how-manieth of that; and a checksum of its inputs."""

    epoch: int
    branch: int
    step: int
    inputs: int = 0


@dataclass(frozen=True)
class Name:
    """Which tensor a stream carries, and whose: `rank` is the sender's."""

    layer: int
    role: int
    rank: int


class ResidualStream:
    """One tensor [B, l, C] of one sender. `value` is where its receivers keep it, for instance the sender's tokens in a tensor of all."""

    def __init__(self, name: Name, value: torch.Tensor, predictor: Predictor):
        self.name = name
        self.predictor = predictor
        self.frames = 0
        self.reference = Reference(value, torch.zeros(value.shape, dtype=value.dtype, device=value.device) if predictor.order == 2 else None)

    @property
    def value(self) -> torch.Tensor:
        """What every receiver holds."""
        return self.reference.value

    def packet_bytes(self, chosen: Codec) -> int:
        """Length of the next packet."""
        used, order = self._used(chosen)
        return HEADER_BYTES + self._betas(order) + used.body_bytes(tuple(self.value.shape), self.value.dtype)

    def encode(self, x: torch.Tensor, chosen: Codec, moment: Moment, packet: torch.Tensor) -> None:
        """Write a packet that brings `value` to (nearly) x; `value` changes only by `decode_`, which the sender must call as well.

        `packet` uint8 in host memory, at least as long as `packet_bytes` says; what is left over stays as it is.
        """
        used, order = self._used(chosen)
        length = self.packet_bytes(chosen) - HEADER_BYTES
        digest = self._digest(moment, order)
        # What is remembered stays until the packet is decoded, which may be a step later.
        base = self.reference if order or used.lossless else Reference(torch.zeros_like(self.value))
        betas = self._betas(order)
        sent = packet[HEADER_BYTES : HEADER_BYTES + length]
        body = sent if x.device == sent.device else torch.empty(length, dtype=torch.uint8, device=x.device)
        beta = self._fit(x) if betas else None
        if beta is not None:
            body[:betas] = torch.nn.functional.pad(beta, (0, betas - len(beta)))
        finite = used.encode(x, base, _scaled(beta), body[betas:])
        if body is not sent:
            sent.copy_(body)
        flags = (DIGEST if digest else 0) | (0 if finite else NONFINITE)
        expected = self._header(used, order, moment)
        seal(packet, replace(expected, flags=expected.flags | flags, length=length, digest=digest))

    def decode_(self, packet: torch.Tensor, chosen: Codec, moment: Moment) -> None:
        """Take in a packet of this stream. Raises ExchangeCorrupted, NonFiniteOutput."""
        used, order = self._used(chosen)
        header, body = open_packet(packet, self._header(used, order, moment))
        if header.flags & NONFINITE:
            where = f"layer {self.name.layer}, step {moment.step}"
            raise NonFiniteOutput(f"rank {self.name.rank} computed NaN or infinity", f"in {where}", "try float32, or a recipe with more bits")
        if header.flags & DIGEST and header.digest != self._digest(moment, order):
            what = f"the reference of layer {self.name.layer} differs between rank {self.name.rank} and this one at step {moment.step}"
            raise ExchangeCorrupted(what, "both must decode the same packets to the same bits", "start the ranks again, with the same versions")
        expected = self._betas(order) + used.body_bytes(tuple(self.value.shape), self.value.dtype)
        if len(body) != expected:
            raise ExchangeCorrupted(f"rank {self.name.rank}'s packet of layer {self.name.layer} has {len(body)} bytes", f"it should have {expected}")
        if order == 0 and not used.lossless:
            self.reference.clear_()
        betas, body = self._betas(order), body.to(self.value.device)
        used.decode_(self.reference, _scaled(body[: len(self.value)]) if betas else None, body[betas:])
        self.frames += 1

    def sent(self, packet: torch.Tensor, chosen: Codec, moment: Moment) -> None:
        """The sender's `decode_`, where `value` is of use for nothing but the next packet."""
        if self.predictor.order == 0 and self._used(chosen)[0].lossless:
            self.frames += 1
        else:
            self.decode_(packet, chosen, moment)

    def digest(self) -> int:
        """64 bits of a hash of what every receiver holds."""
        # Against accidents, not adversaries: blake2b takes 25 times as long, which was a fifth of a step.
        parts = (self.reference.value, self.reference.delta)
        value, delta = (0 if part is None else zlib.crc32(part.detach().cpu().contiguous().view(torch.uint8).numpy().data) for part in parts)
        return delta << 32 | value

    def _used(self, chosen: Codec) -> tuple[Codec, int]:
        """Codec and order of the next packet: of the first one, a keyframe's."""
        if chosen.lossless:
            return chosen, 0
        return (codec(KEYFRAME_CODEC), 0) if self.frames == 0 else (chosen, self.predictor.order)

    def _header(self, used: Codec, order: int, moment: Moment) -> Header:
        batch, tokens, columns = self.value.shape
        flags = KEYFRAME if self.frames == 0 and not used.lossless else 0
        dtype = DTYPES.index(self.value.dtype)
        name = self.name
        where = (moment.epoch, moment.step, moment.branch, name.layer, name.role, name.rank)
        return Header(used.number, order, flags, dtype, *where, batch * tokens, columns, moment.inputs)

    def _digest(self, moment: Moment, order: int) -> int:
        """Every fourth step, another layer's turn each step; 0 when it is not, or when the reference doesn't matter."""
        due = order and (moment.step + self.name.layer) % DIGEST_EVERY == 0
        return self.digest() if due else 0

    def _betas(self, order: int) -> int:
        """How many bytes of the body are β: one a sample, filled up to whole 32-bit words."""
        return -(-len(self.value) // 4) * 4 if order == 2 else 0

    def _fit(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 [B]: β in sixteenths."""
        if self.predictor.damping != ADAPTIVE:
            return torch.full((len(x),), round(BETA_STEPS * float(self.predictor.damping)), dtype=torch.uint8, device=x.device)
        # Some of the tokens tell it as well as all: an odd stride meets every column of a picture. All would take three times as long as the codec.
        some = slice(None, None, max(1, x[0].numel() // FITTED) | 1)
        delta = self.reference.delta[:, some].float().flatten(1)
        change = (x[:, some].float() - self.reference.value[:, some].float()).flatten(1)
        fitted = (change * delta).sum(1) / (delta * delta).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        return (fitted.nan_to_num(0.0) * BETA_STEPS).clamp(0, BETA_STEPS).round().to(torch.uint8)


def _scaled(beta: torch.Tensor | None) -> torch.Tensor | None:
    return None if beta is None else beta.float() / BETA_STEPS
