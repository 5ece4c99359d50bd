"""What ranks that hold different tokens exchange in an attention. One class a mode; each attention layer has one object, which keeps its streams.

Shapes: B batch, H heads, D head size, C = H·D, L tokens of the image, l of them this rank's, T text tokens, W ranks of the group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dite.errors import ExchangeCorrupted, UnsupportedModel
from dite.parallel.attention import Attention, Partial, heads, tokens
from dite.parallel.codecs import Codec
from dite.parallel.group import Pending, RankGroup
from dite.parallel.stream import Moment, Name, Predictor, ResidualStream
from dite.parallel.topology import bounds

Parts = Sequence[tuple[int, int]]
K, V, Q, OUT, TEXT, PATCH, FINAL = range(7)
ROLES = 8  # a role's number in a header is role + ROLES · receiver, where receivers get different things


@dataclass(frozen=True)
class Turn:
    """One exchange of one layer: when, and by which codec."""

    moment: Moment
    codec: Codec


class Shared:
    """A tensor [B, L, C] whose parts different ranks own and all ranks hold: `streams[r]` carries the part of member r."""

    def __init__(self, shape: tuple[int, int, int], parts: Parts, place: tuple[int, int], predictor: Predictor, like: torch.Tensor, dim: int = 1):
        layer, role = place
        self.whole = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.parts = parts
        views = [self.whole.narrow(dim, first, last - first) for first, last in parts]
        self.streams = [ResidualStream(Name(layer, role, rank), view, predictor) for rank, view in enumerate(views)]


def write(streams: Sequence[ResidualStream], values: Sequence[torch.Tensor], turn: Turn, length: int) -> torch.Tensor:
    """The packets of several streams one after another, filled up to `length` bytes."""
    wire = torch.zeros(length, dtype=torch.uint8)
    at = 0
    for stream, value in zip(streams, values, strict=True):
        stream.encode(value, turn.codec, turn.moment, wire[at:])
        at += _padded(stream.packet_bytes(turn.codec))
    return wire


def read(wire: torch.Tensor, streams: Sequence[ResidualStream], turn: Turn, own: bool = False) -> None:
    """Bring several streams up to date; `own`: the packets are this rank's, and nothing but the next ones depends on what they hold. Raises
    ExchangeCorrupted, also for anything but zeros where nothing belongs."""
    at = 0
    for stream in streams:
        size = stream.packet_bytes(turn.codec)
        (stream.sent if own else stream.decode_)(wire[at : at + size], turn.codec, turn.moment)
        if wire[at + size : at + _padded(size)].any():
            raise _not_empty(stream)
        at += _padded(size)
    if wire[at:].any():
        raise _not_empty(streams[-1])


def _not_empty(stream: ResidualStream) -> ExchangeCorrupted:
    where = f"the space behind rank {stream.name.rank}'s packet of layer {stream.name.layer}"
    return ExchangeCorrupted(f"{where} isn't empty", "it was sent as zeros", "the exchange was stopped before a wrong picture could come of it")


def wire_bytes(streams: Sequence[ResidualStream], codec: Codec) -> int:
    """How long `write` makes it."""
    return sum(_padded(stream.packet_bytes(codec)) for stream in streams)


def _padded(size: int) -> int:
    return -(-size // 4) * 4  # bodies are read as numbers of up to 4 bytes


class Gathered:
    """Several tensors of one layer, each shared out alike, gathered in one exchange."""

    def __init__(self, group: RankGroup, shared: Sequence[Shared]):
        self.group = group
        self.shared = shared

    def of(self, member: int) -> list[ResidualStream]:
        return [one.streams[member] for one in self.shared]

    def packet(self, values: Sequence[torch.Tensor], turn: Turn) -> torch.Tensor:
        """What this rank sends; as long as the longest of all ranks'."""
        mine = self.of(self.group.index)
        length = max(wire_bytes(self.of(member), turn.codec) for member in range(self.group.size))
        raw = sum(value.numel() * value.element_size() for value in values)
        self.group.traffic.add(length * (self.group.size - 1), raw * (self.group.size - 1))
        return write(mine, values, turn, length)

    def take(self, member: int, packet: torch.Tensor, turn: Turn) -> None:
        read(packet, self.of(member), turn)

    def exchange(self, values: Sequence[torch.Tensor], turn: Turn) -> None:
        """All at once, waiting for it. The own packet is read while it travels."""
        me, packet = self.group.index, self.packet(values, turn)
        pending = self.group.start_all_gather(packet)
        self.take(me, packet, turn)
        for member, packet in enumerate(pending.wait()):
            if member != me:
                self.take(member, packet, turn)


class Mode(ABC):
    """How the attention of one layer is computed. `parts`: which tokens of the image each member of the group holds."""

    def __init__(self, layer: int, group: RankGroup, parts: Parts, predictor: Predictor):
        self.layer, self.group, self.parts, self.predictor = layer, group, parts, predictor
        self._gathered: Gathered | None = None

    @abstractmethod
    def attend(self, call: Attention, turn: Turn) -> torch.Tensor:
        """The result for this rank's tokens, [B, H, T + l, D]."""

    def finish(self) -> None:  # noqa: B027 - most modes have nothing under way between calls
        """Wait for what is under way; nothing of it is used."""

    def streams(self) -> list[ResidualStream]:
        """Everything that is remembered, in an order that is the same on all ranks."""
        return [stream for shared in (self._gathered.shared if self._gathered else ()) for stream in shared.streams]

    def _keys_values(self, k: torch.Tensor, v: torch.Tensor) -> Gathered:
        """K and V [B, l, C] of all members."""
        if self._gathered is None:
            shape = (len(k), self.parts[-1][1] - self.parts[0][0], k.shape[-1])
            parts = [(first - self.parts[0][0], last - self.parts[0][0]) for first, last in self.parts]
            self._gathered = Gathered(self.group, [Shared(shape, parts, (self.layer, role), self.predictor, x) for role, x in ((K, k), (V, v))])
        return self._gathered


class Local(Mode):
    """Nothing is exchanged."""

    def attend(self, call: Attention, turn: Turn) -> torch.Tensor:
        return call.over(call.image_of(call.k), call.image_of(call.v))


class KVGather(Mode):
    """K and V of all ranks are gathered; what is gathered is what attention reads."""

    def attend(self, call: Attention, turn: Turn) -> torch.Tensor:
        k, v = tokens(call.image_of(call.k)), tokens(call.image_of(call.v))
        gathered = self._keys_values(k, v)
        gathered.exchange([k, v], turn)
        return call.over(*(heads(one.whole, call.k.shape[1]) for one in gathered.shared))


class Ring(Mode):
    """The same packets go round; attention over a block is computed while the next one travels."""

    def attend(self, call: Attention, turn: Turn) -> torch.Tensor:
        k, v = tokens(call.image_of(call.k)), tokens(call.image_of(call.v))
        gathered = self._keys_values(k, v)
        packet = gathered.packet([k, v], turn)
        partial = Partial(call)
        if call.text:
            partial.add(call.text_of(call.k), call.text_of(call.v), call.mask)
        for hop in range(self.group.size):
            member = (self.group.index - hop) % self.group.size
            pending = self.group.start_shift(packet) if hop + 1 < self.group.size else None
            gathered.take(member, packet, turn)
            partial.add(*(heads(one.streams[member].value, call.k.shape[1]) for one in gathered.shared))
            if pending:
                (packet,) = pending.wait()
        return partial.result()


class Displaced(Mode):
    """This rank's K and V as they are, the others' as they were one step ago; they travel while everything else is computed."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._pending: tuple[Pending, Turn] | None = None

    def attend(self, call: Attention, turn: Turn) -> torch.Tensor:
        k, v = tokens(call.image_of(call.k)), tokens(call.image_of(call.v))
        gathered = self._keys_values(k, v)
        first = not gathered.of(0)[0].frames and self._pending is None
        if first:
            gathered.exchange([k, v], turn)
        else:
            self.finish()
        mine = gathered.of(self.group.index)
        own = [stream.value if first else value for stream, value in zip(mine, (k, v), strict=True)]
        result = call.over(*(heads(self._with(shared.whole, value), call.k.shape[1]) for shared, value in zip(gathered.shared, own, strict=True)))
        if not first:
            self._pending = self.group.start_all_gather(gathered.packet([k, v], turn)), turn
        return result

    def finish(self) -> None:
        if self._pending:
            (pending, turn), self._pending = self._pending, None
            for member, packet in enumerate(pending.wait()):
                self._gathered.take(member, packet, turn)

    def _with(self, whole: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        first, last = self.parts[self.group.index]
        return torch.cat([whole[:, :first], own, whole[:, last:]], dim=1)


class Ulysses(Mode):
    """All tokens of some heads instead of some tokens of all heads, and back. `inner` computes attention over the tokens of the group."""

    def __init__(self, layer: int, group: RankGroup, parts: Parts, predictor: Predictor, inner: Mode):
        super().__init__(layer, group, parts, predictor)
        self.inner = inner
        self._first = parts[0][0]
        self._streams: dict[tuple[int, int], ResidualStream] = {}
        self._whole: dict[int, torch.Tensor] = {}
        self._text: Gathered | None = None

    def attend(self, call: Attention, turn: Turn) -> torch.Tensor:
        count, me = call.q.shape[1], self.group.index
        if count < self.group.size:
            raise UnsupportedModel(f"ulysses can't share {count} heads out over {self.group.size} ranks", f"use at most {count} ranks, or kv_gather")
        shares = bounds(count, self.group.size)
        size = call.q.shape[3]
        mine = call.heads(*shares[me])
        own = {role: call.image_of(x) for role, x in ((Q, call.q), (K, call.k), (V, call.v))}
        outgoing = [{role: tokens(x[:, first:last]) for role, x in own.items()} for first, last in shares]
        places = [(slice(first - self._first, last - self._first), slice(None)) for first, last in self.parts]
        shape = (len(call.q), self.parts[-1][1] - self._first, (shares[me][1] - shares[me][0]) * size)
        whole = self._swap(outgoing, places, shape, turn)
        parts = {role: heads(whole[role], mine.q.shape[1]) for role in own}
        gathered = Attention(
            *(mine.join(mine.text_of(x), parts[role]) for role, x in ((Q, mine.q), (K, mine.k), (V, mine.v))),
            mine.text, mine.text_first, mine.mask, mine.scale,
        )  # fmt: skip
        out = self.inner.attend(gathered, turn)
        back = tokens(gathered.image_of(out))
        returned = self._swap(
            [{OUT: back[:, rows]} for rows, _ in places],
            [(slice(None), slice(first * size, last * size)) for first, last in shares],
            (len(back), own[Q].shape[2], count * size),
            turn,
        )[OUT]
        image = heads(returned, count)
        return call.join(self._all_heads(tokens(gathered.text_of(out)), shares, size, turn), image) if call.text else image

    def streams(self) -> list[ResidualStream]:
        text = [stream for shared in (self._text.shared if self._text else ()) for stream in shared.streams]
        return [self._streams[key] for key in sorted(self._streams)] + text + self.inner.streams()

    def finish(self) -> None:
        self.inner.finish()

    def _swap(self, outgoing: list[dict[int, torch.Tensor]], places: list, shape: tuple[int, int, int], turn: Turn) -> dict[int, torch.Tensor]:
        """outgoing[i] goes to member i; `places` (tokens, columns) say where each member's answer belongs in tensors of `shape`, one a role."""
        me = self.group.index
        for role, value in outgoing[me].items():
            if role not in self._whole:
                self._whole[role] = torch.zeros(shape, dtype=value.dtype, device=value.device)
                for member, (rows, columns) in enumerate(places):
                    if member != me:
                        sent = torch.zeros(outgoing[member][role].shape, dtype=value.dtype, device=value.device)
                        self._stream(role, member, sender=me, receiver=member, value=sent)
                        self._stream(role, member, sender=member, receiver=me, value=self._whole[role][:, rows, columns])
            rows, columns = places[me]
            self._whole[role][:, rows, columns] = value
        roles = list(outgoing[me])
        others = [member for member in range(self.group.size) if member != me]
        sends, receives = [], []
        for member in others:
            streams = [self._streams[role, 2 * member] for role in roles]
            values = [outgoing[member][role] for role in roles]
            sends.append((member, write(streams, values, turn, wire_bytes(streams, turn.codec))))
            self.group.traffic.add(len(sends[-1][1]), sum(value.numel() * value.element_size() for value in values))
            expected = wire_bytes([self._streams[role, 2 * member + 1] for role in roles], turn.codec)
            receives.append((member, torch.empty(expected, dtype=torch.uint8)))
        pending = self.group.exchange(sends, receives)
        for member, packet in sends:
            read(packet, [self._streams[role, 2 * member] for role in roles], turn, own=True)
        for (member, _), came in zip(sends, pending.wait(), strict=True):
            read(came, [self._streams[role, 2 * member + 1] for role in roles], turn)
        return {role: self._whole[role] for role in roles}

    def _stream(self, role: int, member: int, sender: int, receiver: int, value: torch.Tensor) -> None:
        name = Name(self.layer, role + ROLES * receiver, sender)
        self._streams[role, 2 * member + (receiver == self.group.index)] = ResidualStream(name, value, self.predictor)

    def _all_heads(self, text: torch.Tensor, shares: Parts, size: int, turn: Turn) -> torch.Tensor:
        """The text's rows with the heads of all ranks; every rank must hold the same, so every rank decodes its own too."""
        if self._text is None:
            columns = [(first * size, last * size) for first, last in shares]
            shape = (*text.shape[:2], columns[-1][1])
            self._text = Gathered(self.group, [Shared(shape, columns, (self.layer, TEXT), self.predictor, text, dim=2)])
        self._text.exchange([text], turn)
        return heads(self._text.shared[0].whole, shares[-1][1])
