"""The map of a plan: a row a block, a column a linear, coloured by bits; inline SVG, its colours from the page's CSS.

Names of layers are whatever a model's author chose: nothing here relies on their shape, and everything is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

BLOCK = re.compile(r"(.+?)\.([0-9]{1,6})\.(.+)", re.DOTALL)
ROW_PX = 22
GAP_PX = 2
CHARACTER_PX = 6.3
SLOPE = math.radians(60)
LEAST_SCALE = 0.84  # a map may shrink so far before it scrolls
MOST_CHARACTERS = {"column": 21, "name": 44}
FACTS = ("weights", "group", "activations", "transform", "rounding", "shape", "kind", "size", "error", "sensitivity")
MARKS = {"smooth": "S", "hadamard": "H"}


@dataclass
class Stack:
    """Blocks of one list: `rows[index][column]` is a layer of the plan, or the reason why it was left alone."""

    name: str
    columns: list[str] = field(default_factory=list)
    rows: dict[int, dict[str, dict[str, Any] | str]] = field(default_factory=dict)


def stacks(layers: Iterable[dict[str, Any]], skipped: dict[str, Any]) -> tuple[list[Stack], list[dict[str, Any]]]:
    """The stacks of blocks, rows and columns in model order, and the layers that lie in none.

    >>> found, outside = stacks([{"name": "blocks.0.fc1"}, {"name": "blocks.0.fc2"}, {"name": "head"}], {"blocks.1.fc1": "why"})
    >>> found[0].columns, list(found[0].rows), outside
    (['fc1', 'fc2'], [0, 1], [{'name': 'head'}])
    """
    found: dict[str, Stack] = {}
    outside = []
    last: dict[tuple[str, int], str] = {}
    for layer in layers:
        if not (match := BLOCK.fullmatch(layer["name"])):
            outside.append(layer)
            continue
        name, index, column = match[1], int(match[2]), match[3]
        stack = found.setdefault(name, Stack(name))
        if column not in stack.columns:
            before = last.get((name, index))
            stack.columns.insert(stack.columns.index(before) + 1 if before else len(stack.columns), column)
        last[name, index] = column
        stack.rows.setdefault(index, {})[column] = layer
    for name, reason in skipped.items():
        if (match := BLOCK.fullmatch(name)) and match[1] in found and match[3] in found[match[1]].columns:
            found[match[1]].rows.setdefault(int(match[2]), {}).setdefault(match[3], str(reason))
    for stack in found.values():
        stack.rows = dict(sorted(stack.rows.items()))
    return list(found.values()), outside


def draw_stack(stack: Stack) -> str:
    """One stack of blocks as `<svg>`."""
    width, height = _cell_width(cell for cells in stack.rows.values() for cell in cells.values()), ROW_PX
    captions = dict(zip(stack.columns, short_names(stack.columns), strict=True))
    left = 10 + CHARACTER_PX * max(len(str(index)) for index in stack.rows)
    top = 12 + CHARACTER_PX * math.sin(SLOPE) * max(len(caption) for caption in captions.values())
    ends = [left + (at + 0.5) * width + CHARACTER_PX * math.cos(SLOPE) * len(caption) + 8 for at, caption in enumerate(captions.values())]
    parts = []
    for at, (column, caption) in enumerate(captions.items()):
        place = f'transform="translate({left + (at + 0.5) * width + 3:.1f} {top - 6:.1f}) rotate(-60)"'
        parts.append(f"<text {place}><title>{escape(column)}</title>{escape(caption)}</text>")
    for row, (index, cells) in enumerate(stack.rows.items()):
        y = top + row * height
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 15:.1f}" text-anchor="end">{index}</text>')
        for at, column in enumerate(stack.columns):
            if column in cells:
                parts.append(_cell((left + at * width, y, width), cells[column], f"{stack.name}.{index}.{column}"))
    size = (max(left + len(stack.columns) * width, *ends), top + len(stack.rows) * height)
    return _svg(size, f"bits of the layers of {stack.name}", parts)


def draw_outside(layers: list[dict[str, Any]]) -> str:
    """Layers that lie in no block as `<svg>`: a row each, its name beside it."""
    width, height = _cell_width(layers), ROW_PX
    parts, captions = [], short_names([layer["name"] for layer in layers], "name")
    for row, (layer, caption) in enumerate(zip(layers, captions, strict=True)):
        parts.append(_cell((0, row * height, width), layer, layer["name"]))
        parts.append(f'<text x="{width + 6}" y="{row * height + 15}"><title>{escape(layer["name"])}</title>{escape(caption)}</text>')
    size = (width + 12 + CHARACTER_PX * max(map(len, captions)), len(layers) * height)
    return _svg(size, "bits of the layers outside the blocks", parts)


def facts(layer: dict[str, Any]) -> dict[str, str]:
    """What a plan says of one layer, by FACTS, in words; what it doesn't say is left out."""
    group, rank, error, size = layer.get("group_size"), layer.get("rank"), layer.get("error"), layer.get("bytes")
    activation, sensitivity = layer.get("activation_bits"), layer.get("sensitivity")
    values = (
        f"{layer['weight_bits']} bits",
        f"{group}" if group else "channel",
        f"{activation} bits" if activation else "as they are",
        str(layer.get("transform") or "none") + (f", rank {rank}" if rank else ""),
        str(layer.get("rounding") or ""),
        f"{layer['in_features']} → {layer['out_features']}",
        str(layer.get("kind") or ""),
        size_text(size) if size is not None else "",
        f"{error:.3g}" if error is not None else "",
        f"{sensitivity:.3g}" if sensitivity is not None else "",
    )
    return {name: value for name, value in zip(FACTS, values, strict=True) if value}


def marks(layer: dict[str, Any]) -> str:
    """What was done to a layer besides rounding it, a letter each.

    >>> marks({"transform": "smooth+hadamard", "rank": 16}), marks({"transform": "none"})
    ('SHL', '')
    """
    done = str(layer.get("transform") or "none").split("+")
    return "".join(letter for name, letter in MARKS.items() if name in done) + ("L" if layer.get("rank") else "")


def shade(num_bits: float) -> str:
    """The CSS class of a cell: three steps of one hue, the strongest for the most bits."""
    return "bits4" if num_bits <= 4 else "bits6" if num_bits <= 6 else "bits8"


def size_text(num_bytes: float) -> str:
    """A size for people.

    >>> size_text(512), size_text(34816), size_text(13.1e6), size_text(2.4e10)
    ('512 bytes', '34.8 kB', '13.1 MB', '24.00 GB')
    """
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{digits}f} {unit}"
    return f"{num_bytes:.0f} bytes"


def short_names(names: list[str], place: str = "column") -> list[str]:
    """`names` cut in their middle to what a place holds, told apart where that is possible.

    >>> short_names(["attn1.to_q", "norm1.emb.timestep_embedder.linear_1"])
    ['attn1.to_q', 'norm1…linear_1']
    """
    most = MOST_CHARACTERS[place]
    by_parts = [_ends(name, most) for name in names]
    return [short if by_parts.count(short) == 1 else _middle_cut(name, most) for name, short in zip(names, by_parts, strict=True)]


def _ends(name: str, most: int) -> str:
    first, _, rest = name.partition(".")
    ends = f"{first}…{rest.rpartition('.')[2]}"
    return name if len(name) <= most else ends if rest and len(ends) <= most else _middle_cut(name, most)


def _middle_cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[len(name) - most + most // 2 :]}"


def _cell_width(cells: Iterable[dict[str, Any] | str]) -> float:
    """What a group size and the most letters need beside each other."""
    return 31 + 7.5 * max([1, *(len(marks(cell)) for cell in cells if isinstance(cell, dict))])


def _cell(place: tuple[float, float, float], cell: dict[str, Any] | str, name: str) -> str:
    """A rectangle of one layer at (left, top, width), with what a pointer resting on it reads."""
    x, y, width = place
    width -= GAP_PX
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{ROW_PX - GAP_PX}" rx="3"'
    if isinstance(cell, str):
        return f'<g class="alone"><title>{escape(name)}\nleft alone: {escape(cell)}</title><rect {box}/></g>'
    title = "\n".join([name, *(f"{key}: {value}" for key, value in facts(cell).items())])
    group, letters = str(cell.get("group_size") or "ch"), marks(cell)
    start = f'x="{x + 3:.1f}"' if letters else f'x="{x + width / 2:.1f}" text-anchor="middle"'
    text = f'<text {start} y="{y + 14:.1f}">{escape(group)}</text>'
    if letters:
        text += f'<text class="mark" x="{x + width - 2:.1f}" y="{y + 14:.1f}" text-anchor="end">{letters}</text>'
    return f'<g class="cell {shade(cell["weight_bits"])}"><title>{escape(title)}</title><rect {box}/>{text}</g>'


def _svg(size: tuple[float, float], label: str, parts: list[str]) -> str:
    width, height = (math.ceil(side) for side in size)
    style = f'style="width:{width}px;min-width:{math.floor(width * LEAST_SCALE)}px"'
    return f'<svg class="map" viewBox="0 0 {width} {height}" {style} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
