"""`report.html`: one file, no script, nothing loaded from anywhere; readable on a phone, in light and dark."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import torch
import torch.nn.functional as F

from dite.pictures import difference, grid, to_png
from dite_evals import plots
from dite_evals.fid import extrapolate
from dite_evals.page import figure, page, tiles
from dite_evals.report import Report, headline, plain

SHOWN = 24
SHEET = 100
THUMBNAIL_PX = 256
GAIN = 8


def render(report: Report, document: dict[str, Any]) -> str:
    """The whole page as text."""
    body = _fidelity(report) if report.kind == "fidelity" else _fid(report)
    command = f"<h2>Again</h2><pre>{escape(document['command'])}</pre>" if document["command"] else ""
    return page(
        report.title,
        f'<h1>{escape(report.title)}</h1><p class="soft">{_summary(report)}</p>{tiles(headline(report.metrics))}{body}'
        f"<h2>Configuration</h2>{_table(document['configuration'])}<h2>Environment</h2>{_table(document['environment'])}{command}",
    )


def _summary(report: Report) -> str:
    n = report.metrics["n"]
    if report.kind == "fidelity":
        return f"{n} images from each model, of the same seeds and conditions. Higher PSNR and SSIM mean closer to the original."
    return (
        f"{n} images against reference statistics; a lower FID is closer. Compare it only with FIDs of the same protocol, N and extractor. "
        "In brackets are 95% intervals: FID's of the FID at this N, those for N → ∞ of the FID of infinitely many samples."
    )


def _fidelity(report: Report) -> str:
    values = [row["psnr"] for row in report.samples]
    figures = figure(plots.per_step(report.metrics["per_step_error"]), "Error of the latents after each step, mean over samples")
    figures += figure(plots.histogram(values, report.metrics["psnr"]["mean"], "PSNR, dB"), "PSNR of single images; dashed: the mean")
    return f'<h2>How the error grows, and how it spreads</h2><div class="plots">{figures}</div>{_worst(report)}'


def _worst(report: Report) -> str:
    if report.images is None or report.baseline_images is None:
        return ""
    order = sorted(range(len(report.samples)), key=lambda index: report.samples[index]["psnr"])[:SHOWN]
    of = f"The {len(order)} worst of {len(report.samples)}" if len(order) < len(report.samples) else f"All {len(order)}"
    note = f'<p class="soft">{of}; the difference is shown {GAIN} times as strong as it is.</p>'
    cards = "".join(_card(report, index) for index in order)
    return f'<h2>Worst first</h2>{note}<div class="cards">{cards}</div>'


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
    caption = "Mean FID of 1 to 5 disjoint blocks against 1/N, and the line through them towards N → ∞"
    figures = figure(plots.against_size(report.curve, extrapolate(report.curve)), caption)
    if report.images is not None:
        first = report.images[:SHEET]
        sheet = grid(first, min(10, len(first)), 2 if first.shape[-1] <= 64 else 1)
        figures += figure(image_tag(sheet, f"the first {len(first)} samples", most_px=1024), f"The first {len(first)} samples, in order")
    left_out = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report.metrics.get("left_out", {}).items())
    notes = f'<h2>Left out</h2><ul class="soft">{left_out}</ul>' if left_out else ""
    return f'<h2>FID against N, and what was measured</h2><div class="plots">{figures}</div>{notes}'


def image_tag(image: torch.Tensor, alt: str, most_px: int = THUMBNAIL_PX) -> str:
    """An `<img>` of uint8 [3, H, W] with its PNG inside; larger images are averaged down to `most_px`, smaller ones shown pixel by pixel."""
    largest = max(image.shape[-2:])
    if largest > most_px:
        size = [max(1, round(side * most_px / largest)) for side in image.shape[-2:]]
        image = F.interpolate(image[None].float(), size=size, mode="area")[0].round().to(torch.uint8)
    data = base64.b64encode(to_png(image)).decode()
    pixels = ' class="pixels"' if largest < THUMBNAIL_PX else ""
    return f'<img{pixels} width="{image.shape[-1]}" height="{image.shape[-2]}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(plain(value))}</td></tr>" for key, value in values.items())
    return f'<div class="table"><table>{rows}</table></div>'
