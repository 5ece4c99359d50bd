"""`report.html`: one file, no script, nothing loaded from anywhere; readable on a phone, in light and dark."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import torch
import torch.nn.functional as F

from dite.pictures import difference, grid, to_png
from dite_evals import plots
from dite_evals.report import Report, headline, plain

SHOWN = 24
SHEET = 100
THUMBNAIL_PX = 256
GAIN = 8

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #ffffff; --ink: #1d1f23; --soft: #63676f; --rule: #e3e0d8; --accent: #2459c9; --warm: #c2571a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1c1f25; --ink: #e9e7e2; --soft: #9a9ea8; --rule: #30343c; --accent: #7ea6ff; --warm: #f0a36b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: 0 0 .8rem; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.tile, .card, .plot { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; }
.tile { padding: .8rem 1rem; } .tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile.long b { font-size: .95rem; } .tile span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .7rem; }
.plot { margin: 0; padding: .8rem .8rem .4rem; } .plot figcaption { font-size: .9rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.gridline { stroke: var(--rule); } .axis { stroke: var(--soft); } .line { fill: none; stroke: var(--accent); stroke-width: 2; }
.dot { fill: var(--accent); } .hover { fill: transparent; } .hover:hover { fill: var(--accent); }
.bar { fill: var(--accent); opacity: .8; } .mean { stroke: var(--warm); stroke-width: 2; stroke-dasharray: 5 4; }
.fit { stroke: var(--warm); stroke-width: 1.5; stroke-dasharray: 5 4; } .limit { fill: var(--warm); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .7rem; }
.card { padding: .6rem; margin: 0; } .trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: .35rem; }
.trio div { font-size: .72rem; color: var(--soft); text-align: center; }
img { width: 100%; height: auto; display: block; border-radius: .25rem; background: var(--rule); } img.pixels { image-rendering: pixelated; }
.card figcaption { display: flex; justify-content: space-between; gap: .6rem; font-size: .85rem; margin-top: .35rem; font-variant-numeric: tabular-nums; }
.card figcaption span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def render(report: Report, document: dict[str, Any]) -> str:
    """The whole page as text."""
    body = _fidelity(report) if report.kind == "fidelity" else _fid(report)
    command = f"<h2>Again</h2><pre>{escape(document['command'])}</pre>" if document["command"] else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(report.title)}</h1><p class="soft">{_summary(report)}</p>{_tiles(report)}{body}'
        f"<h2>Configuration</h2>{_table(document['configuration'])}<h2>Environment</h2>{_table(document['environment'])}{command}"
        "</main></body></html>\n"
    )


def _summary(report: Report) -> str:
    n = report.metrics["n"]
    if report.kind == "fidelity":
        return f"{n} images from the same seeds and conditions, once from each model. Higher PSNR and SSIM mean closer to the original; errors are relative to it."
    return f"{n} images against reference statistics. Lower is closer. An FID may be compared only with others of the same protocol, N and extractor."


def _tiles(report: Report) -> str:
    tiles = "".join(
        f'<div class="tile{" long" if len(value) > 14 else ""}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in headline(report.metrics)
    )
    return f'<div class="tiles">{tiles}</div>'


def _fidelity(report: Report) -> str:
    values = [row["psnr"] for row in report.samples]
    figures = _figure(plots.per_step(report.metrics["per_step_error"]), "Error of the latents after each step, mean over samples")
    figures += _figure(plots.histogram(values, report.metrics["psnr"]["mean"], "PSNR, dB"), "PSNR of single images; dashed: the mean")
    return f'<h2>How the error grows, and how it spreads</h2><div class="plots">{figures}</div>{_worst(report)}'


def _worst(report: Report) -> str:
    if report.images is None or report.baseline_images is None:
        return ""
    order = sorted(range(len(report.samples)), key=lambda index: report.samples[index]["psnr"])[:SHOWN]
    of = f"the {len(order)} worst of {len(report.samples)}" if len(order) < len(report.samples) else f"all {len(order)}"
    cards = "".join(_card(report, index) for index in order)
    return f'<h2>Worst first</h2><p class="soft">{of[0].upper() + of[1:]}; the difference is shown {GAIN} times as strong as it is.</p><div class="cards">{cards}</div>'


def _card(report: Report, index: int) -> str:
    original, quantized = report.baseline_images[index], report.images[index]
    row = report.samples[index]
    name = str(report.class_names.get(row["condition"], row["condition"]))
    apart = difference(quantized[None], original[None], GAIN)[0]
    trio = "".join(
        f"<div>{image_tag(image, f'{name}, {caption}')}{caption}</div>"
        for image, caption in ((original, "original"), (quantized, "quantized"), (apart, f"{GAIN}× difference"))
    )
    caption = f'<span title="{escape(name)}">{escape(name)} · seed {row["seed"]}</span><b>{row["psnr"]:.1f}&nbsp;dB</b>'
    return f'<figure class="card"><div class="trio">{trio}</div><figcaption>{caption}</figcaption></figure>'


def _fid(report: Report) -> str:
    caption = "Mean FID of 1 to 5 disjoint blocks against 1/N, and where the fitted line meets N → ∞"
    figures = _figure(plots.against_size(report.curve, report.metrics["fid_infinity"]), caption)
    if report.images is not None:
        first = report.images[:SHEET]
        sheet = grid(first, min(10, len(first)), 2 if first.shape[-1] <= 64 else 1)
        figures += _figure(image_tag(sheet, f"the first {len(first)} samples", most_px=1024), f"The first {len(first)} samples, in order")
    return f'<h2>FID against N, and what was measured</h2><div class="plots">{figures}</div>'


def image_tag(image: torch.Tensor, alt: str, most_px: int = THUMBNAIL_PX) -> str:
    """An `<img>` of uint8 [3, H, W] with its PNG inside; larger images are averaged down to `most_px`, smaller ones shown pixel by pixel."""
    largest = max(image.shape[-2:])
    if largest > most_px:
        size = [max(1, round(side * most_px / largest)) for side in image.shape[-2:]]
        image = F.interpolate(image[None].float(), size=size, mode="area")[0].round().to(torch.uint8)
    data = base64.b64encode(to_png(image)).decode()
    pixels = ' class="pixels"' if largest < THUMBNAIL_PX else ""
    return f'<img{pixels} width="{image.shape[-1]}" height="{image.shape[-2]}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _figure(inner: str, caption: str) -> str:
    return f'<figure class="plot">{inner}<figcaption>{escape(caption)}</figcaption></figure>'


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(plain(value))}</td></tr>" for key, value in values.items())
    return f'<div class="table"><table>{rows}</table></div>'
