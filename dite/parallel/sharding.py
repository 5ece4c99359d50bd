"""Tokens shared out over ranks: rows chosen where a family's tokens begin, attention caught, rows joined where they end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dite.errors import UnsupportedModel
from dite.parallel.attention import Attention, Catch
from dite.parallel.families import Family, Rows, attentions_of, blocks_of, refusal
from dite.parallel.hooks import Hooks

Range = tuple[int, int]


@dataclass
class Sharding:
    """What a mode must provide: which rows of `count` tokens this rank takes now, who computes attention, who joins.

    `rows(count)`: first and last row; `taken()`: how many that were. `attend(layer, call)`: the attention of layer number `layer`. `join(x)`: x
    [B, l, C] → [B, L, C].
    """

    rows: Callable[[int], Range]
    taken: Callable[[], int]
    attend: Callable[[int, Attention], torch.Tensor]
    join: Callable[[torch.Tensor], torch.Tensor]


def install(model: nn.Module, family: Family, sharding: Sharding, hooks: Hooks) -> None:
    """Put `sharding` on a model."""
    signature = inspect.signature(type(model).forward)
    inputs = {place.of.removeprefix("input "): place for place in family.split if place.of.startswith("input ")}

    def call_with_rows(forward: Callable) -> Callable:
        def sharded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(model, *args, **kwargs)
            reason = refusal(model, family, bound.arguments)
            if reason:
                raise UnsupportedModel(f"this call can't be shared out over ranks: {reason}", "use the model on one device")
            for name, place in inputs.items():
                bound.arguments[name] = _take(bound.arguments[name], place, sharding.rows)
            return forward(*bound.args[1:], **bound.kwargs)

        return sharded

    hooks.replace(model, "forward", call_with_rows)
    for place in family.split:
        if place.of.startswith("output "):
            hooks.after(model.get_submodule(place.of.removeprefix("output ")), partial(_take, place=place, rows=sharding.rows))
        elif place.of == "first block's input":
            hooks.before(blocks_of(model, family)[0], partial(_take_first, place=place, rows=sharding.rows))
    hooks.after(model.get_submodule(family.join), sharding.join)
    for number, module in enumerate(attentions_of(model, family)):
        hooks.replace(module, "forward", partial(_caught, module, family, partial(sharding.attend, number), sharding.taken))


def _take(value: Any, place: Rows, rows: Callable[[int], Range]) -> Any:
    if isinstance(value, tuple | list):
        chosen = range(len(value)) if place.items is None else place.items
        return type(value)(_take(one, place, rows) if index in chosen else one for index, one in enumerate(value))
    first, last = rows(value.shape[place.dim])
    return value.narrow(place.dim, first, last - first)


def _take_first(args: tuple, kwargs: dict, place: Rows, rows: Callable[[int], Range]) -> tuple[tuple, dict]:
    if args:
        return (_take(args[0], place, rows).contiguous(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _take(kwargs["hidden_states"], place, rows).contiguous()}


def _caught(module: nn.Module, family: Family, attend: Callable, taken: Callable[[], int], forward: Callable) -> Callable:
    """forward, with its scaled_dot_product_attention handed over."""

    def sharded(*args: Any, **kwargs: Any) -> Any:
        catch = Catch(lambda *call: attend(_described(call, family, taken())))
        with catch:
            result = forward(*args, **kwargs)
        if catch.caught != 1:
            raise UnsupportedModel(
                f"{type(module).__name__} called torch's scaled_dot_product_attention {catch.caught} times, not once",
                'choose torch\'s own attention: model.set_attention_backend("native"), or the default processors',
            )
        return result

    return sharded


def _described(call: tuple, family: Family, mine: int) -> Attention:
    q, k, v, mask, scale = call
    text = k.shape[2] - mine
    if (text and family.text is None) or text < 0 or q.shape[2] != k.shape[2]:
        raise UnsupportedModel(
            f"an attention has {q.shape[2]} queries and {k.shape[2]} keys where this rank holds {mine} tokens", "use the model on one device"
        )
    found = Attention(q, k, v, text, family.text == "first", None, scale)
    if mask is None:
        return found
    if mask.ndim != 4 or mask.shape[2] != 1 or mask.shape[3] != k.shape[2]:
        raise UnsupportedModel(f"an attention mask of shape {list(mask.shape)} can't be shared out; only one over keys can", "leave the mask out")
    image = mask[..., text:] if found.text_first else mask[..., : mask.shape[3] - text]
    if not bool((image if mask.dtype == torch.bool else image == 0).all()):
        raise UnsupportedModel("an attention mask hides tokens of the image", "leave the mask out")
    masked = mask[..., :text] if found.text_first else mask[..., mask.shape[3] - text :]
    return Attention(q, k, v, text, found.text_first, masked if text else None, scale)
