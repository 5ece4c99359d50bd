"""Several calls of one model as one: rows joined along the batch, the result cut apart again.

A diffusion transformer takes a timestep for each row, so that calls of unlike steps fit into one forward:

    call 1   x [2, C, H, W]   t [2]     ┐
    call 2   x [1, C, H, W]   t [1]     ├─ forward(x [5, C, H, W], t [5]) ─ results of 2, 1 and 2 rows
    call 3   x [2, C, H, W]   t [2]     ┘

What isn't a row of the batch (FLUX's positions, sizes, flags) has to be equal; calls that differ in it, or in a shape, are made one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

WITHOUT_ROWS = {"img_ids", "txt_ids"}  # FLUX's positions: their first dimension counts tokens


@dataclass(frozen=True)
class Call:
    """Arguments of one forward by name, and how many rows of the batch they hold."""

    arguments: dict[str, Any]
    rows: int

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Call:
        """`hidden_states` says how many rows there are."""
        return cls(arguments, len(arguments["hidden_states"]))


def alike(a: Call, b: Call) -> bool:
    """Whether two calls can be made as one."""
    return a.arguments.keys() == b.arguments.keys() and all(
        _alike(name, value, a.rows, b.arguments[name], b.rows) for name, value in a.arguments.items()
    )


def _alike(name: str, a: Any, rows_a: int, b: Any, rows_b: int) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.device != b.device:
            return False
        batched = [_has_rows(name, value, rows) for value, rows in ((a, rows_a), (b, rows_b))]
        return a.shape[1:] == b.shape[1:] if all(batched) else not any(batched) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(key, value, rows_a, b[key], rows_b) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_alike(name, *pair) for pair in zip(a, [rows_a] * len(a), b, [rows_b] * len(a), strict=True))
    return bool(a == b)


def join(calls: Sequence[Call]) -> Call:
    """One call of all rows, in order. The calls have to be alike."""
    first = calls[0]
    if len(calls) == 1:
        return first
    return Call({name: _joined(name, [call.arguments[name] for call in calls], calls) for name in first.arguments}, sum(call.rows for call in calls))


def _joined(name: str, values: list[Any], calls: Sequence[Call]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values) if _has_rows(name, first, calls[0].rows) else first
    if isinstance(first, dict):
        return {key: _joined(key, [value[key] for value in values], calls) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(name, list(one), calls) for one in zip(*values, strict=True))
    return first


def take(call: Call, rows: torch.Tensor) -> Call:
    """The call of some rows, by number; a row may come twice."""

    def taken(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows.to(value.device)] if _has_rows(name, value, call.rows) else value
        if isinstance(value, dict):
            return {key: taken(key, one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(taken(name, one) for one in value)
        return value

    return Call({name: taken(name, value) for name, value in call.arguments.items()}, len(rows))


def _has_rows(name: str, value: torch.Tensor, rows: int) -> bool:
    return value.dim() > 0 and len(value) == rows and name not in WITHOUT_ROWS


def run(
    forward: Callable[..., Any],
    calls: Sequence[Call],
    micro_batch: int | None = None,
    part: Callable[[int], AbstractContextManager] = nullcontext,
) -> list[Any]:
    """The result of each of some calls that are alike, from one forward of them all; with `micro_batch`, from forwards of exactly so many rows, the
    last one padded. Forward i of those is made inside `part(i)`: to ranks that remember what they exchanged, they are no calls of their own."""
    whole = join(calls)
    if micro_batch is None:
        result = forward(**whole.arguments)
    else:
        parts = []
        for start in range(0, whole.rows, micro_batch):
            numbers = torch.arange(start, start + micro_batch).clamp(max=whole.rows - 1)
            with part(start // micro_batch):
                parts.append(_first(forward(**take(whole, numbers).arguments)))
        result = _like(torch.cat(parts)[: whole.rows], whole.arguments)
    pieces, start = [], 0
    for call in calls:
        pieces.append(_with_output(result, _first(result)[start : start + call.rows]))
        start += call.rows
    return pieces


def _first(result: Any) -> torch.Tensor:
    return result[0]


def _like(output: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """As a model returns it."""
    if arguments.get("return_dict", True):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)
    return (output,)


def _with_output(result: Any, output: torch.Tensor) -> Any:
    return (output, *result[1:]) if isinstance(result, tuple) else type(result)(sample=output)
