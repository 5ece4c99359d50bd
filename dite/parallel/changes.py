"""What changes from step to step: the measure of what an exchange must carry, and of how well it can be foretold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dite.errors import UsageError
from dite.parallel.budget import Profile
from dite.parallel.stream import Moment, ResidualStream


@dataclass
class _Cell:
    """Sums over the streams of one (step, layer)."""

    change: float = 0.0  # ‖x − ref‖²
    value: float = 0.0  # ‖x‖²
    before: float = 0.0  # ‖Δ‖²
    product: float = 0.0  # ⟨x − ref, Δ⟩


@dataclass
class Changes:
    """Sums over all requests so far of keys and values (roles 0 and 1), by step and layer. `layer` is the one that is computed now."""

    layer: int = 0
    cells: dict[tuple[int, int], _Cell] = field(default_factory=dict)
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)  # rows and columns of the largest stream of a layer

    def add(self, moment: Moment, role: int, x: torch.Tensor, stream: ResidualStream) -> None:
        """Take in what a stream is about to carry."""
        if role > 1:
            return
        rows, columns = x.shape[0] * x.shape[1], x.shape[2]
        self.shapes[self.layer] = max(self.shapes.get(self.layer, (0, 0)), (rows, columns))
        cell = self.cells.setdefault((moment.step, self.layer), _Cell())
        x = x.float()
        change = x - stream.value.float() if stream.frames else x
        cell.change += float(change.square().sum())
        cell.value += float(x.square().sum())
        if stream.reference.delta is not None:
            delta = stream.reference.delta.float()
            cell.before += float(delta.square().sum())
            cell.product += float((change * delta).sum())

    def table(self) -> dict[str, list[list[float]]]:
        """`change`: ‖Δ‖/‖x‖, and `correlation` of successive changes, both [step][layer]; of step 0 there is neither."""
        steps, layers = self._size()
        found: dict[str, list[list[float]]] = {"change": [], "correlation": []}
        for step in range(1, steps):
            row = [self.cells[step, layer] for layer in range(layers)]
            found["change"].append([(cell.change / max(cell.value, 1e-30)) ** 0.5 for cell in row])
            found["correlation"].append([cell.product / max((cell.change * cell.before) ** 0.5, 1e-30) for cell in row])
        return found

    def profile(self, ranks: int) -> Profile:
        """For a byte budget: what one rank sends, and how much of it changes."""
        steps, layers = self._size()
        energy = [[self.cells[step, layer].change for layer in range(layers)] for step in range(steps)]
        shapes = [(2 * self.shapes[layer][0], self.shapes[layer][1]) for layer in range(layers)]  # keys and values
        return Profile(tuple(map(tuple, energy)), tuple(shapes), ranks)

    def _size(self) -> tuple[int, int]:
        if not self.cells:
            raise UsageError("no changes were recorded", "nothing was drawn yet, or the mode sends no keys and values (pipefusion)", "use kv_gather")
        return 1 + max(step for step, _ in self.cells), 1 + max(layer for _, layer in self.cells)
