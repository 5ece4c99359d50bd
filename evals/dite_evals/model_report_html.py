"""A model's page as HTML: one file, no script, nothing loaded from anywhere; readable on a phone, in light and dark."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from dite_evals import plots
from dite_evals.fid import extrapolate
from dite_evals.model_sections import Block, Section, Table, errors_of, model_facts, sections, tiles_of
from dite_evals.page import figure, page, tiles
from dite_evals.plan_html import layer_map, left_alone, printable, size_plot, worst_layers

OPEN_ROWS = 20


def render(document: dict[str, Any]) -> str:
    """The whole page as text; `document` is what `gather` found."""
    document = printable(document)
    title = f"{document['title']}: quantization, quality, speed, exchange"
    body = f'<h1>{escape(document["title"])}</h1><p class="soft">{escape(_summary(document))}</p>{tiles(tiles_of(document))}'
    body += "".join(_section(section) for section in sections(document))
    body += _layers(document["quantization"]) if document["quantization"] else ""
    body += f"<h2>The model</h2>{_facts(model_facts(document))}<h2>Gathered with</h2>{_facts(list(document['environment'].items()))}"
    return page(title, body)


def _summary(document: dict[str, Any]) -> str:
    missing = [entry["section"] for entry in document["not_measured"]]
    text = "What was measured of this model. Every figure carries what it depends on; each was checked to be this model's."
    return text + (f" Not measured: {', '.join(missing)}." if missing else "")


def _section(section: Section) -> str:
    text = f'<h2>{escape(section.title)}</h2><p class="soft">{escape(section.lead)}</p>'
    text += "".join(_block(section.key, block) for block in section.blocks)
    if section.missing:
        what = "Not measured" if not section.blocks else "The error of each layer was not recorded"
        text += f"<p>{what}. To measure it:</p><pre>{escape(section.missing)}</pre>"
    return text


def _block(key: str, block: Block) -> str:
    text = f"<h3>{escape(block.title)}</h3>" if block.title else ""
    if key in ("fidelity", "fid"):
        text += tiles(block.facts) + _curves(key, block.data)
    elif block.facts:
        text += _facts(block.facts)
    text += "".join(map(_table, block.tables))
    text += f'<p class="soft depends">{escape(block.depends)}</p>' if block.depends else ""
    text += f"<pre>{escape(block.command)}</pre>" if block.command else ""
    return text


def _curves(key: str, entry: dict[str, Any]) -> str:
    """How the error grows over the steps, or how FID falls with N."""
    if key == "fidelity":
        errors = [math.nan if value is None else value for value in entry["metrics"]["per_step_error"]]
        drawing = figure(plots.per_step(errors), "Error of the latents after each step, mean over samples") if errors else ""
    else:
        curve = [(point["n"], point["fid"]) for point in entry.get("curve", [])]
        caption = "Mean FID of 1 to 5 disjoint blocks against 1/N, and the line through them towards N → ∞"
        drawing = figure(plots.against_size(curve, extrapolate(curve)), caption) if len({size for size, _ in curve}) > 1 else ""
    return f'<div class="plots">{drawing}</div>' if drawing else ""


def _layers(found: dict[str, Any]) -> str:
    """The map of the layers, their errors, and the search's plans; after all figures of the whole model, since it is long."""
    known = [(layer["name"], layer["sqnr_db"]) for layer in found["layers"] if layer["sqnr_db"] is not None]
    drawing = figure(plots.per_layer(known, "SQNR, dB"), f"SQNR of {errors_of(found['layers'])}; higher is better") if known else ""
    text = f'<h2>Error of each layer</h2><div class="plots">{drawing}</div>' if drawing else ""
    text += size_plot(found["plan"]) if found["plan"] else ""
    return text + layer_map(found) + worst_layers(found["layers"], errors_of(found["layers"])) + left_alone(found["skipped"])


def _facts(facts: list[tuple[str, Any]] | Any) -> str:
    rows = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in facts)
    return f'<div class="table"><table>{rows}</table></div>'


def _table(table: Table) -> str:
    def cell(at: int, text: str, kind: str) -> str:
        return f"<{kind}{_NUMBER if at >= table.numbers else ''}>{escape(text)}</{kind}>"

    head = "".join(cell(at, text, "th") for at, text in enumerate(table.columns))
    rows = ""
    for index, row in enumerate(table.rows):
        rows += f"<tr{_THIS if index in table.this else ''}>{''.join(cell(at, text, 'td') for at, text in enumerate(row))}</tr>"
    drawn = f'<div class="table"><table class="columns measured"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return drawn if len(table.rows) <= OPEN_ROWS else f"<details><summary>{len(table.rows)} rows</summary>{drawn}</details>"


_NUMBER, _THIS = ' class="number"', ' class="this"'
