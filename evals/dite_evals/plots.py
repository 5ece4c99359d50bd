"""Plots as inline SVG: no script, no font, no colour of its own (the page's CSS variables decide, in light and dark)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44
LOG_FROM = 5  # a range of positive values wider than this factor is drawn on a logarithmic axis
LOG_MARGIN = 1.25
LABEL_PX = (8.6, 14)  # a character's width and a line's height, for text that must not collide even where a phone enlarges it


class _Axes:
    """Linear axes over the data's ranges; draws frame, ticks and labels."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str):
        self.x_ticks, self.y_ticks = ticks(*x_range), ticks(*y_range)
        self.x_range = (min(x_range[0], self.x_ticks[0]), max(x_range[1], self.x_ticks[-1]))
        self.y_range = (min(y_range[0], self.y_ticks[0]), max(y_range[1], self.y_ticks[-1]))
        self.x_label, self.y_label = x_label, y_label

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def wrap(self, marks: str, title: str) -> str:
        """A whole `<svg>` with `marks` inside the axes; `title` is what a screen reader says."""
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
        for value in self.y_ticks:
            parts.append(f'<line class="gridline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{self.y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in self.x_ticks:
            parts.append(f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>{marks}')
        parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x_label)}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y_label)}</text></svg>')
        return "".join(parts)


class _LogAxes(_Axes):
    """The same, logarithmic upwards; for positive values only."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str):
        super().__init__(x_range, y_range, x_label, y_label)
        self.y_ticks, self.y_range = log_ticks(*y_range), y_range

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - math.log(value / low) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)


class Point(NamedTuple):
    """One mark, and what it is called."""

    x: float
    y: float
    name: str


def per_step(errors: Sequence[float]) -> str:
    """Mean latent relative error after each sampler step."""
    finite = [(step, value) for step, value in enumerate(errors, 1) if math.isfinite(value)]
    axes = _Axes((1, max(2, len(errors))), (0, max((value for _, value in finite), default=1) or 1), "step", "latent relative error")
    points = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in finite)
    marks = f'<polyline class="line" points="{points}"/>'
    marks += "".join(_dot(axes, step, value, f"step {step}: {value:.4g}", 6 if len(finite) > 30 else 4) for step, value in finite)
    return axes.wrap(marks, f"latent relative error after each of {len(errors)} steps")


def per_layer(values: Sequence[tuple[str, float]], y_label: str) -> str:
    """One dot a layer, in the model's order; all values finite."""
    low, high = min(0, *(value for _, value in values)), max(0, *(value for _, value in values))
    axes = _Axes((1, max(2, len(values))), (low, high if high > low else 1), "layer, in the model's order", y_label)
    marks = "".join(_dot(axes, at, value, f"{name}: {value:.4g}", 3) for at, (name, value) in enumerate(values, 1))
    return axes.wrap(marks, f"{y_label} of {len(values)} layers")


def histogram(values: Sequence[float], mean: float, x_label: str) -> str:
    """Counts of `values` in about √N bins, with the mean marked."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    bins = max(4, min(24, round(math.sqrt(len(finite)) * 1.5)))
    counts = [0] * bins
    for value in finite:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    axes = _Axes((low, high), (0, max(counts)), x_label, "images")
    marks = ""
    edges = [low + (high - low) * index / bins for index in range(bins + 1)]
    for (start, end), count in zip(pairwise(edges), counts, strict=True):
        left, width, top = axes.x(start) + 0.5, axes.x(end) - axes.x(start) - 1, axes.y(count)
        box = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{axes.y(0) - top:.1f}"'
        marks += f'<rect class="bar" {box}><title>{start:.4g} to {end:.4g}: {count}</title></rect>'
    if math.isfinite(mean):
        x = f"{axes.x(mean):.1f}"
        marks += f'<line class="mean" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"><title>mean {mean:.4g}</title></line>'
    return axes.wrap(marks, f"{x_label} of {len(finite)} images, mean {mean:.4g}")


def against_size(curve: Sequence[tuple[int, float]], limit: float) -> str:
    """FID against 1/N with its fitted line, down to 1/N = 0."""
    points = [(1000 / size, value) for size, value in curve]
    values = [value for _, value in points] + [limit]
    spread = (max(values) - min(values)) or 1
    right = max(x for x, _ in points)
    axes = _Axes((0, right), (min(values) - 0.1 * spread, max(values) + 0.1 * spread), "1000 / N", "FID")
    mean_x, mean_y = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    at_right = limit + (mean_y - limit) / mean_x * right
    marks = f'<line class="fit" x1="{axes.x(0):.1f}" y1="{axes.y(limit):.1f}" x2="{axes.x(right):.1f}" y2="{axes.y(at_right):.1f}"/>'
    marks += "".join(_dot(axes, x, y, f"N {size}: {y:.4g}", 4) for (x, y), (size, _) in zip(points, curve, strict=True))
    marks += f'<circle class="limit" cx="{axes.x(0):.1f}" cy="{axes.y(limit):.1f}" r="5"><title>N to infinity: {limit:.4g}</title></circle>'
    return axes.wrap(marks, f"FID against 1/N; its limit is {limit:.4g}")


def size_against_error(chosen: Point | None, frontier: Sequence[Point], evaluated: Sequence[Point], uniform: Sequence[Point], x_label: str) -> str:
    """Errors of plans against their sizes: the predicted frontier, plans that were measured, uniform plans by name, the chosen one on top.

    All values finite; sizes above zero. At least one point is needed. Errors that differ by more than LOG_FROM get a logarithmic axis.
    """
    everything = [*frontier, *evaluated, *uniform, *([chosen] if chosen else [])]
    low, high = min(point.y for point in everything), max(point.y for point in everything)
    left, right = min(point.x for point in everything), max(point.x for point in everything)
    margin = (right - left) * 0.04 or abs(right) * 0.1 or 1.0
    logarithmic = low > 1e-12 and high < 1e12 and high / low > LOG_FROM
    y_range = (low / LOG_MARGIN, high * LOG_MARGIN) if logarithmic else (min(0, low), high * 1.05 or 1.0)
    axes = (_LogAxes if logarithmic else _Axes)((left - margin, right + margin), y_range, x_label, "relative error")
    line = [(axes.x(point.x), axes.y(point.y)) for point in sorted(frontier)]
    marks = f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>' if len(line) > 1 else ""
    marks += "".join(f'<circle class="tried" {_at(axes, point)} r="2.6"><title>{escape(point.name)}</title></circle>' for point in evaluated)
    for point in uniform:
        corner = f'x="{axes.x(point.x) - 4:.1f}" y="{axes.y(point.y) - 4:.1f}"'
        marks += f'<rect class="uniform" {corner} width="8" height="8"><title>{escape(point.name)}: {point.y:.4g}</title></rect>'
    if chosen:
        marks += f'<circle class="chosen" {_at(axes, chosen)} r="6"><title>{escape(chosen.name)}: {chosen.y:.4g}</title></circle>'
    named = [(axes.x(point.x), axes.y(point.y), point.name, "") for point in sorted(uniform)]
    named[:0] = [(axes.x(chosen.x), axes.y(chosen.y), chosen.name, "this")] if chosen else []
    soft = [*_along(line), *((axes.x(point.x), axes.y(point.y)) for point in evaluated)]
    return axes.wrap(marks + _labels(named, soft), f"relative error against size of {len(everything)} plans")


def _at(axes: _Axes, point: Point) -> str:
    return f'cx="{axes.x(point.x):.1f}" cy="{axes.y(point.y):.1f}"'


def _along(line: Sequence[tuple[float, float]], every_px: float = 6) -> list[tuple[float, float]]:
    """Places on a line, close enough together that no text slips between them."""
    places = []
    for (x0, y0), (x1, y1) in pairwise(line):
        steps = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / every_px))
        places += [(x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps) for step in range(steps)]
    return places


def _labels(named: Sequence[tuple[float, float, str, str]], soft: Sequence[tuple[float, float]]) -> str:
    """Text beside each mark where it covers no other mark or text and the fewest `soft` places; left out where there is no such place."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _, _ in named]
    found = ""
    for own, (x, y, name, kind) in enumerate(named):
        width, height = LABEL_PX[0] * len(name), LABEL_PX[1]
        corners = [(x + side, y + up) for side in (9, -width / 2, -9 - width) for up in (-height / 2, -height - 7, 7)]
        corners.remove((x - width / 2, y - height / 2))
        best = None
        for left, top in corners:
            box = (left, top, left + width, top + height)
            inside = left >= LEFT + 2 and box[2] <= WIDTH and top >= 2 and box[3] <= HEIGHT - BOTTOM - 2
            if not inside or any(_overlap(box, other) for which, other in enumerate(taken) if which != own):
                continue
            cost = sum(left - 2 <= a <= box[2] + 2 and top - 2 <= b <= box[3] + 2 for a, b in soft)
            if best is None or cost < best[0]:
                best = (cost, box)
        if best:
            box = best[1]
            taken.append(box)
            at, anchor = (box[0], "start") if box[0] > x else (box[2], "end") if box[2] < x else (x, "middle")
            found += f'<text class="beside {kind}" x="{at:.1f}" y="{box[3] - 3:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def heat_map(rows: Sequence[Sequence[float]], title: str, x_label: str, y_label: str) -> str:
    """A whole SVG file: one cell a value, rows downwards, black on white, the range of its shades written out."""
    low, high = min(map(min, rows)), max(map(max, rows))
    wide, tall = (WIDTH - LEFT - RIGHT) / len(rows[0]), (HEIGHT - TOP - BOTTOM) / len(rows)
    cells = "".join(
        f'<rect x="{LEFT + column * wide:.2f}" y="{TOP + 10 + row * tall:.2f}" width="{wide:.2f}" height="{tall:.2f}" '
        f'fill="hsl(215 60% {92 - 72 * (value - low) / ((high - low) or 1):.0f}%)"><title>{number(value)}</title></rect>'
        for row, values in enumerate(rows)
        for column, value in enumerate(values)
    )
    text = f'<text x="{LEFT}" y="14">{escape(title)}: {number(low)} (light) to {number(high)} (dark)</text>'
    text += f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)} 0 to {len(rows[0]) - 1}</text>'
    text += f'<text transform="translate(20 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)} 1 to {len(rows)}</text>'
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return f'<svg {frame}><rect width="100%" height="100%" fill="white"/>{cells}{text}</svg>\n'


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`, both above zero; over many decades, powers alone.

    >>> log_ticks(0.01, 0.09), log_ticks(1e-4, 3)
    ([0.01, 0.02, 0.05], [0.0001, 0.001, 0.01, 0.1, 1.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{factor}e{power}") for power in powers for factor in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    return [value for value in every if low <= value <= high]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 10), ticks(0.013, 0.0171)
    ([0, 2, 4, 6, 8, 10], [0.013, 0.014, 0.015, 0.016, 0.017])
    """
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, max(first + 1, last + 1))]


def number(value: float) -> str:
    """A tick's text: short, without a trailing zero.

    >>> number(0.25), number(12.0), number(1e-05), number(0.0)
    ('0.25', '12', '1e-05', '0')
    """
    return f"{value:.4g}"


def _dot(axes: _Axes, x: float, y: float, title: str, radius: float) -> str:
    kind = "hover" if radius > 4 else "dot"
    return f'<circle class="{kind}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="{radius}"><title>{escape(title)}</title></circle>'
