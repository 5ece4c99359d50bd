"""What several ranks would compute, in one process: the same schedule and the same codecs, and attention written out plainly.

Everything but attention is done token by token, so that only attention, and what crosses from stage to stage in pipefusion, depends on who holds
what.
This is the oracle of the modes, and the way to learn what a mode costs in quality without the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dite.errors import UnsupportedModel
from dite.parallel.attention import Attention, heads, tokens
from dite.parallel.changes import Changes
from dite.parallel.families import blocks_of
from dite.parallel.group import Traffic
from dite.parallel.hooks import Hooks
from dite.parallel.modes import OUT, PATCH, TEXT, K, Q, Turn, V
from dite.parallel.runners import Runner
from dite.parallel.sharding import Range
from dite.parallel.stream import Name, ResidualStream
from dite.parallel.topology import Topology, bounds


class Alone:
    """In place of a RankGroup: nobody else is there."""

    def __init__(self, rank: int = 0):
        self.rank = rank
        self.traffic = Traffic()

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def leave(self, reason: BaseException) -> None:
        pass


@dataclass
class _Layer:
    """What is remembered of one attention, or of one boundary between stages."""

    streams_by_key: dict[tuple, ResidualStream] = field(default_factory=dict)
    before: tuple[torch.Tensor, torch.Tensor] | None = None

    def finish(self) -> None:
        pass

    def streams(self) -> list[ResidualStream]:
        return [self.streams_by_key[key] for key in sorted(self.streams_by_key)]


class Simulation(Runner):
    """All ranks of `topology` in this process. cfg changes nothing but who computes, and is left out."""

    def __init__(self, *arguments: Any, topology: Topology, patches: int | None = None):
        super().__init__(*arguments)
        self.topology = topology
        self.ranks = topology.tokens
        self.patches = patches or 2 * self.ranks
        self.changes = Changes()
        self._of_mode: Callable[[_Layer, Attention, Turn], torch.Tensor] = {
            "kv_gather": self._gathered,
            "ring": self._gathered,
            "displaced": self._displaced,
            "pipefusion": self._piped,
            "ulysses": self._ulysses,
            "ulysses+ring": self._ulysses,
        }[topology.mode]

    def install(self, hooks: Hooks) -> None:
        super().install(hooks)
        if self.topology.mode == "pipefusion":
            blocks = blocks_of(self.model, self.family)
            for stage, (first, _) in enumerate(bounds(len(blocks), self.ranks)):
                if stage:
                    hooks.before(blocks[first], lambda args, kwargs, stage=stage: self._cross(stage - 1, args, kwargs))

    def rows(self, count: int) -> Range:
        if count < self.ranks:
            raise UnsupportedModel(f"{count} tokens can't be shared out over {self.ranks} ranks", f"use at most {count} ranks")
        self.parts = bounds(count, self.ranks)
        return 0, count

    def taken(self) -> int:
        return self.parts[-1][1]

    def join(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def attend(self, layer: int, call: Attention) -> torch.Tensor:
        self.changes.layer = layer
        return self._of_mode(self.remembered.layers.setdefault(layer, _Layer()), call, self.turn(layer))

    def _gathered(self, layer: _Layer, call: Attention, turn: Turn) -> torch.Tensor:
        return self._over(call, *(self._all(layer, role, tokens(call.image_of(x)), turn) for role, x in ((K, call.k), (V, call.v))))

    def _displaced(self, layer: _Layer, call: Attention, turn: Turn) -> torch.Tensor:
        k, v = tokens(call.k), tokens(call.v)
        before = layer.before
        layer.before = (self._all(layer, K, k, turn), self._all(layer, V, v, turn))
        if before is None:
            return self._over(call, *layer.before)
        results = []
        for first, last in self.parts:
            fresh = [torch.cat([old[:, :first], new[:, first:last], old[:, last:]], dim=1) for old, new in zip(before, (k, v), strict=True)]
            results.append(self._over(replace(call, q=call.q[:, :, first:last]), *fresh))
        return torch.cat(results, dim=2)

    def _piped(self, layer: _Layer, call: Attention, turn: Turn) -> torch.Tensor:
        k, v = tokens(call.k), tokens(call.v)
        before, layer.before = layer.before, (k, v)
        if before is None:
            return self._over(call, k, v)
        results = []
        for first, last in bounds(k.shape[1], min(self.patches, k.shape[1])):
            mixed = [torch.cat([new[:, :last], old[:, last:]], dim=1) for old, new in zip(before, (k, v), strict=True)]
            results.append(self._over(replace(call, q=call.q[:, :, first:last]), *mixed))
        return torch.cat(results, dim=2)

    def _cross(self, stage: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        layer = self.remembered.layers.setdefault(-1 - stage, _Layer())
        parts = bounds(x.shape[1], min(self.patches, x.shape[1]))
        turn = self.turn(stage)
        x = torch.cat([self._sent(layer, (PATCH, patch, 0), x[:, first:last], turn) for patch, (first, last) in enumerate(parts)], dim=1)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def _ulysses(self, layer: _Layer, call: Attention, turn: Turn) -> torch.Tensor:
        across = self.topology.ulysses
        shares = [(first * call.q.shape[3], last * call.q.shape[3]) for first, last in bounds(call.q.shape[1], across)]
        q, k, v = (self._swapped(layer, role, tokens(call.image_of(x)), shares, turn) for role, x in ((Q, call.q), (K, call.k), (V, call.v)))
        if self.topology.ring > 1:
            k, v = (self._around(layer, role, x, shares, turn) for role, x in ((K, k), (V, v)))
        count = call.q.shape[1]
        joined = replace(call, q=call.join(call.text_of(call.q), heads(q, count)))
        out = self._over(joined, k, v)
        image = heads(self._swapped(layer, OUT, tokens(call.image_of(out)), shares, turn), count)
        if not call.text:
            return image
        text = tokens(call.text_of(out))
        told = torch.cat([self._sent(layer, (TEXT, 0, j), text[:, :, a:b], turn) for j, (a, b) in enumerate(shares)], dim=2)
        return call.join(heads(told, count), image)

    def _swapped(self, layer: _Layer, role: int, x: torch.Tensor, shares: list[Range], turn: Turn) -> torch.Tensor:
        """x [B, L, C] after tokens were exchanged for heads, or back: what stays with its rank is exact."""
        x = x.clone()
        for rank, (first, last) in enumerate(self.parts):
            for j, (a, b) in enumerate(shares):
                if rank % len(shares) != j:
                    x[:, first:last, a:b] = self._sent(layer, (role, rank, j), x[:, first:last, a:b], turn)
        return x

    def _around(self, layer: _Layer, role: int, x: torch.Tensor, shares: list[Range], turn: Turn) -> torch.Tensor:
        """x [B, L, C] after the chunks of tokens that a ulysses group holds went round."""
        x, across = x.clone(), len(shares)
        for ring in range(self.topology.ring):
            first, last = self.parts[ring * across][0], self.parts[(ring + 1) * across - 1][1]
            for j, (a, b) in enumerate(shares):
                x[:, first:last, a:b] = self._sent(layer, (role, 1000 + ring, j), x[:, first:last, a:b], turn)
        return x

    def _all(self, layer: _Layer, role: int, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        return torch.cat([self._sent(layer, (role, rank, 0), x[:, first:last], turn) for rank, (first, last) in enumerate(self.parts)], dim=1)

    def _sent(self, layer: _Layer, key: tuple[int, int, int], x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """What receivers hold of x, which a stream of its own carries."""
        if key not in layer.streams_by_key:
            layer.streams_by_key[key] = ResidualStream(Name(0, 0, 0), torch.zeros(x.shape, dtype=x.dtype, device=x.device), self.predictor)
        stream = layer.streams_by_key[key]
        self.changes.add(turn.moment, key[0], x, stream)
        packet = torch.zeros(stream.packet_bytes(turn.codec), dtype=torch.uint8)
        self.group.traffic.add(len(packet), x.numel() * x.element_size())
        stream.encode(x, turn.codec, turn.moment, packet)
        stream.decode_(packet, turn.codec, turn.moment)
        return stream.value.clone()

    def _over(self, call: Attention, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return call.over(heads(k, call.k.shape[1]), heads(v, call.k.shape[1]))
