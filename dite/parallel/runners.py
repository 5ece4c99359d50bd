"""Who drives a call of the model whose tokens are shared out: all ranks at once on their own rows, or patch after patch through stages of blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dite.errors import UnsupportedModel
from dite.parallel.attention import Attention, heads, tokens
from dite.parallel.codecs import codec
from dite.parallel.families import Family, blocks_of
from dite.parallel.group import Pending, RankGroup
from dite.parallel.hooks import Hooks
from dite.parallel.modes import FINAL, PATCH, Gathered, Mode, Shared, Turn, read, wire_bytes, write
from dite.parallel.sharding import Range, Sharding, install
from dite.parallel.stream import Moment, Predictor, ResidualStream
from dite.parallel.topology import bounds

RAW = codec("none")
CodecOf = Callable[[int, int], str]  # (step, layer) → a codec's name


@dataclass
class Remembered:
    """What is kept between the steps of one request and branch; `shape` is that of the latents that it belongs to."""

    shape: tuple[int, ...] | None = None
    layers: dict[int, Any] = field(default_factory=dict)

    def fit(self, shape: tuple[int, ...]) -> None:
        """Forget everything when the call's shape is another one: keyframes follow."""
        if self.shape != shape:
            self.drain()
            self.shape, self.layers = shape, {}

    def drain(self) -> None:
        """Wait for what is under way."""
        for layer in self.layers.values():
            layer.finish()

    def streams(self) -> list[ResidualStream]:
        return [stream for key in sorted(self.layers) for stream in self.layers[key].streams()]


class Runner(ABC):
    """Shares one model's calls out over `group`. `remembered` and `moment` are set before each call."""

    def __init__(self, model: nn.Module, family: Family, group: RankGroup, predictor: Predictor, codec_of: CodecOf):
        self.model, self.family, self.group, self.predictor, self.codec_of = model, family, group, predictor, codec_of
        self.moment = Moment(0, 0, 0)
        self.remembered = Remembered()
        self.parts: list[Range] = []

    def install(self, hooks: Hooks) -> None:
        """Put everything on the model."""
        install(self.model, self.family, Sharding(self.rows, self.taken, self.attend, self.join), hooks)

    def call(self, forward: Callable[[], Any], moment: Moment, remembered: Remembered) -> Any:
        """One call of the model with all of its inputs."""
        self.moment, self.remembered = moment, remembered
        return forward()

    @abstractmethod
    def rows(self, count: int) -> Range:
        """Which rows of `count` tokens."""

    @abstractmethod
    def taken(self) -> int:
        """How many rows this rank has."""

    @abstractmethod
    def attend(self, layer: int, call: Attention) -> torch.Tensor:
        """The attention of a layer, for this rank's rows."""

    @abstractmethod
    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[B, l, C] of this rank's rows → [B, L, C]."""

    def turn(self, layer: int) -> Turn:
        return Turn(self.moment, codec(self.codec_of(self.moment.step, layer)))


class OwnRows(Runner):
    """Every rank its own rows, all of the time. `make(layer, parts)` builds the mode of a layer."""

    def __init__(self, *arguments: Any, make: Callable[[int, list[Range]], Mode]):
        super().__init__(*arguments)
        self.make = make

    def rows(self, count: int) -> Range:
        if count < self.group.size:
            raise UnsupportedModel(f"{count} tokens can't be shared out over {self.group.size} ranks", f"use at most {count} ranks")
        self.parts = bounds(count, self.group.size)
        return self.parts[self.group.index]

    def taken(self) -> int:
        first, last = self.parts[self.group.index]
        return last - first

    def attend(self, layer: int, call: Attention) -> torch.Tensor:
        if layer not in self.remembered.layers:
            self.remembered.layers[layer] = self.make(layer, self.parts)
        return self.remembered.layers[layer].attend(call, self.turn(layer))

    def join(self, x: torch.Tensor) -> torch.Tensor:
        return join_rows(self.group, x, self.parts, self.moment)


def join_rows(group: RankGroup, x: torch.Tensor, parts: list[Range], moment: Moment) -> torch.Tensor:
    """[B, l, C] of every rank → [B, L, C], as they are."""
    shared = Shared((len(x), parts[-1][1], x.shape[-1]), parts, (0, FINAL), Predictor(0), x)
    Gathered(group, [shared]).exchange([x], Turn(moment, RAW))
    return shared.whole


class PipeFusion(Runner):
    """Each rank has some of the blocks; patches flow through them. A patch sees the keys and values that earlier patches left behind in this step,
    and those of the step before of later ones. In the first step of a request all tokens go as one patch.

    Unlike the paper's own, the pipeline empties after each step, because the pipeline's loop wants the whole of a step's output.
    """

    def __init__(self, *arguments: Any, patches: int | None = None):
        super().__init__(*arguments)
        blocks = blocks_of(self.model, self.family)
        self.patches = patches or 2 * self.group.size
        self.blocks = bounds(len(blocks), self.group.size)[self.group.index]
        self._patch = 0
        self._last = False
        self._sent: list[Pending] = []
        self._out: torch.Tensor | None = None

    def install(self, hooks: Hooks) -> None:
        super().install(hooks)
        all_blocks = blocks_of(self.model, self.family)
        first, last = self.blocks
        for block in (*all_blocks[:first], *all_blocks[last:]):
            hooks.replace(block, "forward", lambda _: _skip)
        if first:
            hooks.before(all_blocks[first], self._receive)
        if last < len(all_blocks):
            hooks.after(all_blocks[last - 1], self._send)

    def call(self, forward: Callable[[], Any], moment: Moment, remembered: Remembered) -> Any:
        self.moment, self.remembered = moment, remembered
        self._out, self._sent = None, []
        whole = not remembered.layers
        self._patch, self._last = (-1, True) if whole else (0, False)
        result = forward()
        for patch in range(1, len(self.parts)) if not whole else ():
            self._patch, self._last = patch, patch + 1 == len(self.parts)
            result = forward()
        for pending in self._sent:
            pending.wait()
        return result

    def rows(self, count: int) -> Range:
        self.parts = bounds(count, min(self.patches, count))
        if self._patch == 0 and len(self.parts) == 1:
            self._last = True
        return self._range()

    def taken(self) -> int:
        first, last = self._range()
        return last - first

    def attend(self, layer: int, call: Attention) -> torch.Tensor:
        k, v = tokens(call.k), tokens(call.v)
        if layer not in self.remembered.layers:
            self.remembered.layers[layer] = _Kept(k.clone(), v.clone())
        kept = self.remembered.layers[layer]
        first, last = self._range()
        kept.k[:, first:last], kept.v[:, first:last] = k, v
        return call.over(heads(kept.k, call.k.shape[1]), heads(kept.v, call.k.shape[1]))

    def join(self, x: torch.Tensor) -> torch.Tensor:
        count, (first, last) = self.parts[-1][1], self._range()
        if self._out is None:
            self._out = torch.zeros(len(x), count, x.shape[-1], dtype=x.dtype, device=x.device)
        self._out[:, first:last] = x
        if self._last:
            self._out = broadcast_rows(self.group, self._out, self.moment)
        return self._out

    def _range(self) -> Range:
        return (0, self.parts[-1][1]) if self._patch < 0 else self.parts[self._patch]

    def _send(self, output: torch.Tensor) -> torch.Tensor:
        streams, values = self._streams(self.group.index, output)
        turn = self.turn(self.group.index)
        packet = write(streams, values, turn, wire_bytes(streams, turn.codec))
        self.group.traffic.add(len(packet), output.numel() * output.element_size())
        self._sent.append(self.group.exchange([(self.group.index + 1, packet)], []))
        read(packet, streams, turn, own=True)
        return output

    def _receive(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        streams, _ = self._streams(self.group.index - 1, x)
        turn = self.turn(self.group.index - 1)
        packet = torch.empty(wire_bytes(streams, turn.codec), dtype=torch.uint8)
        self.group.exchange([], [(self.group.index - 1, packet)]).wait()
        read(packet, streams, turn)
        received = torch.cat([stream.value for stream in streams], dim=1)
        return ((received, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": received})

    def _streams(self, stage: int, x: torch.Tensor) -> tuple[list[ResidualStream], list[torch.Tensor]]:
        """The streams of the patches under way between `stage` and the next one, and what x has for each."""
        key = -1 - stage
        if key not in self.remembered.layers:
            shape = (len(x), self.parts[-1][1], x.shape[-1])
            self.remembered.layers[key] = _Boundary(Shared(shape, self.parts, (stage, PATCH), self.predictor, x))
        streams = self.remembered.layers[key].streams()
        if self._patch >= 0:
            return [streams[self._patch]], [x]
        return streams, [x[:, first:last] for first, last in self.parts]


@dataclass
class _Kept:
    """Keys and values [B, L, C] of one layer, of this step or the one before."""

    k: torch.Tensor
    v: torch.Tensor

    def finish(self) -> None:
        pass

    def streams(self) -> list[ResidualStream]:
        return []


@dataclass
class _Boundary:
    """What flows from one stage to the next."""

    shared: Shared

    def finish(self) -> None:
        pass

    def streams(self) -> list[ResidualStream]:
        return self.shared.streams


def broadcast_rows(group: RankGroup, x: torch.Tensor, moment: Moment) -> torch.Tensor:
    """The last member's [B, L, C], as it is."""
    last = group.size - 1
    shared = Shared(tuple(x.shape), [(0, x.shape[1])], (0, FINAL), Predictor(0), x)
    turn = Turn(moment, RAW)
    length = wire_bytes(shared.streams, RAW)
    if group.index == last:
        packet = write(shared.streams, [x], turn, length)
        group.traffic.add(length * last, x.numel() * x.element_size() * last)
    else:
        packet = torch.empty(length, dtype=torch.uint8)
    group.broadcast(packet, last)
    read(packet, shared.streams, turn)
    return shared.whole


def _skip(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In place of a block that another rank has."""
    return hidden_states
