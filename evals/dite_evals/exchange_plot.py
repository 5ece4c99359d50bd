"""The picture of an exchange bench: milliseconds a step against bandwidth, one line for each mode and codec, drawn with Pillow.

Colour says the mode, the dash the codec: raw is a full line, one bit is dotted. Both axes are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dite.outputs import check_writable
from dite_evals.plots import number

SCALE = 2  # drawn larger and shrunk: Pillow's lines have no soft edges of their own
PANEL = (640, 640)
MARGIN = (64, 46, 150, 48)  # left, top, right, bottom
COLOURS = {
    "one_device": "#111111", "kv_gather": "#0072b2", "ring": "#009e73", "ulysses": "#d55e00", "displaced": "#999999", "pipefusion": "#cc79a7",
    "cfg": "#b8a200",
}  # fmt: skip
DASHES = {"none": (), "int8": (14, 4), "int4": (8, 5), "int2": (4, 4), "int1": (1.5, 4)}


def draw(panels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """`panels`: a title and a document of the exchange bench each. Writes a PNG."""
    check_writable(path.parent)
    width, height = PANEL
    sheet = Image.new("RGB", (SCALE * width * len(panels), SCALE * height), "white")
    for place, (title, document) in enumerate(panels.items()):
        sheet.paste(_Panel(title, document).image, (SCALE * width * place, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((width * len(panels), height), Image.Resampling.LANCZOS).save(path, optimize=True)


class _Panel:
    """One set of axes."""

    def __init__(self, title: str, document: Mapping[str, Any]):
        self.image = Image.new("RGB", (SCALE * PANEL[0], SCALE * PANEL[1]), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font, self.small = (ImageFont.load_default(SCALE * size) for size in (13, 11))
        self.links = sorted(document["links"], key=lambda link: _bandwidth(link))
        self.x_range = (_bandwidth(self.links[0]) / 1.15, _bandwidth(self.links[-1]) * 1.15)
        times = [1e3 * row["seconds_per_step"] for row in document["rows"]]
        self.y_range = (min(times) / 1.1, max(times) * 1.1)
        self._axes(title)
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for link in self.links:
            for row in document["rows"]:
                if row["link"] == link["link"]:
                    point = self._at(_bandwidth(link), 1e3 * row["seconds_per_step"])
                    lines.setdefault((row["mode"], row["codec"]), []).append(point)
        for (mode, codec), points in lines.items():
            self._line(points, COLOURS.get(mode, "#000000"), DASHES.get(codec, (2, 8)), 3 if mode == "one_device" else 2)
            for x, y in points:
                self.pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=COLOURS.get(mode, "#000000"))
        self._legend(list(lines))

    def _at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = MARGIN
        along = math.log(x / self.x_range[0]) / math.log(self.x_range[1] / self.x_range[0])
        up = math.log(y / self.y_range[0]) / math.log(self.y_range[1] / self.y_range[0])
        return SCALE * (left + along * (PANEL[0] - left - right)), SCALE * (PANEL[1] - bottom - up * (PANEL[1] - top - bottom))

    def _axes(self, title: str) -> None:
        left, top, right, bottom = (SCALE * size for size in MARGIN)
        end, base = SCALE * PANEL[0] - right, SCALE * PANEL[1] - bottom
        self.pen.text((left, 12 * SCALE), title, "black", self.font)
        for value in _ticks(*self.y_range):
            y = self._at(self.x_range[0], value)[1]
            self.pen.line((left, y, end, y), "#e4e4e4", SCALE)
            self.pen.text((left - 6 * SCALE, y), number(value), "black", self.small, anchor="rm")
        for link in self.links:
            x = self._at(_bandwidth(link), self.y_range[0])[0]
            self.pen.line((x, top, x, base), "#e4e4e4", SCALE)
            self.pen.text((x, base + 5 * SCALE), link["link"], "black", self.small, anchor="mt")
        self.pen.line((left, base, end, base), "black", SCALE)
        self.pen.text(((left + end) / 2, base + 22 * SCALE), "link, by measured bandwidth", "black", self.small, anchor="mt")
        self.pen.text((left, top - 4 * SCALE), "ms a step (not the first)", "black", self.small, anchor="lb")

    def _line(self, points: Sequence[tuple[float, float]], colour: str, dash: tuple[float, ...], width: int) -> None:
        if not dash:
            self.pen.line([*points], colour, width * SCALE, joint="curve")
            return
        on, period = SCALE * dash[0], SCALE * sum(dash)
        for (x0, y0), (x1, y1) in pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0)
            for piece in range(math.ceil(length / period)):
                begin, end = piece * period / length, min(1.0, (piece * period + on) / length)
                self.pen.line((x0 + begin * (x1 - x0), y0 + begin * (y1 - y0), x0 + end * (x1 - x0), y0 + end * (y1 - y0)), colour, width * SCALE)

    def _legend(self, drawn: Sequence[tuple[str, str]]) -> None:
        x, y = SCALE * (PANEL[0] - MARGIN[2] + 14), SCALE * (MARGIN[1] + 6)
        entries = [(mode, COLOURS.get(mode, "#000000"), ()) for mode in COLOURS if mode in {mode for mode, _ in drawn}]
        codecs = {codec for _, codec in drawn}
        entries += [("raw bf16" if codec == "none" else codec, "#555555", dash) for codec, dash in DASHES.items() if codec in codecs]
        for name, colour, dash in entries:
            self._line([(x, y), (x + 34 * SCALE, y)], colour, dash, 2)
            self.pen.text((x + 40 * SCALE, y), name.replace("_", " "), "black", self.small, anchor="lm")
            y += 20 * SCALE


def _ticks(low: float, high: float) -> list[float]:
    """Closer than those of `plots`: all there is to see lies within a decade."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for factor in (1, 1.5, 2, 3, 4, 5, 7) if low <= (value := factor * 10.0**power) <= high]


def _bandwidth(link: Mapping[str, Any]) -> float:
    """MB/s; of a link that isn't shaped as much as TCP carried."""
    return (link["measured_bytes_per_s"] or link["probes"][0]["measured_link"]["bandwidth_bytes_per_s"]) / 1e6
