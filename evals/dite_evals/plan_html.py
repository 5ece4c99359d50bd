"""`plan.html`: what a search decided for each layer, what that costs, and what else was possible; one file, no script."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from html import escape
from typing import Any

import yaml

from dite_evals import plots
from dite_evals.page import figure, page, tiles
from dite_evals.plan_map import FACTS, draw_outside, draw_stack, facts, marks, shade, size_text, stacks

WORST = 10
FRONTIER_POINTS = 300
OPEN_RECIPE_LINES = 40
KEPT = "\n\t"  # control characters that stay
STRATEGIES = {"dp": "dynamic programming over the layers' sizes and errors", "evolution": "evolution of whole plans"}
FITNESSES = {"surrogate": "the relative error of the final latents of short trajectories", "fid": "FID"}
MEANINGS = {"S": "smoothing of the input channels", "H": "Hadamard rotation", "L": "low-rank branch beside the codes"}
NUMERIC = ("size", "error", "sensitivity")


def plan_html(document: dict[str, Any]) -> str:
    """The whole page as text; `document` is the contents of a `plan.json`. Search, errors, frontier and comparisons may be missing or null."""
    document = printable(document)
    model = document["model"]["class"]
    layers = document["layers"]
    body = (
        f'<h1>A quantization plan for {escape(model)}</h1><p class="soft">{escape(_summary(document))}</p>'
        f"{tiles(_figures(document))}{layer_map(document)}{size_plot(document)}{worst_layers(layers)}{left_alone(document.get('skipped') or {})}"
        f"{_recipe(document.get('recipe') or {})}"
    )
    return page(f"Plan for {model}", body)


def _summary(document: dict[str, Any]) -> str:
    """The plan in plain words."""
    count, size, before, error = len(document["layers"]), document["bytes"], document.get("baseline_bytes"), document.get("error")
    smaller = f", {before / size:.2f} times smaller than before ({size_text(before)})" if before and size else ""
    choice = "The one quantized linear layer has" if count == 1 else f"Each of the {count} quantized linear layers has"
    text = f"{choice} its own number of bits, group size and transform. The transformer takes {size_text(size)}{smaller}."
    if _number(error):
        of = (document.get("search") or {}).get("fitness") == "fid"
        text += f" {'Its FID' if of else 'The relative error of the final latents of short trajectories'} is {error:.3g}."
    return text + _against_uniform(document) + _search(document.get("search"))


def _against_uniform(document: dict[str, Any]) -> str:
    """The plan beside the uniform one nearest in size, whichever is better."""
    size, error = document["bytes"], document.get("error")
    known = [row for row in document.get("uniform") or [] if _number(row.get("error")) and row["error"] > 0]
    if not known or not _number(error) or error <= 0:
        return ""
    nearest = min(known, key=lambda row: abs(row["bytes"] - size))
    factor = nearest["error"] / error
    verdict = f"{factor:.2g} times that of this plan" if factor >= 1 else f"less: this plan's is {1 / factor:.2g} times as large"
    named = f"{nearest['name']}, {size_text(nearest['bytes'])}"
    return f" With one scheme everywhere, the plan nearest in size ({named}) has {nearest['error']:.3g}, {verdict}."


def _search(search: dict[str, Any] | None) -> str:
    if not search:
        return ""
    strategy, fitness = search.get("strategy"), search.get("fitness")
    budget = search.get("budget") or {}
    limit = budget.get("limit")
    limits = {"bytes": size_text, "bits": lambda value: f"{value:.3g} bits a weight"}
    shown = limits.get(budget.get("kind"), lambda value: f"{value:.4g} ({budget.get('kind')})")
    under = f", under a limit of {shown(limit)}" if limit else ""
    return f" It was found by {STRATEGIES.get(strategy, strategy)}, judged by {FITNESSES.get(fitness, fitness)}{under}."


def _figures(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The tiles: what is not known is left out."""
    size, before, search, layers = document["bytes"], document.get("baseline_bytes"), document.get("search") or {}, document["layers"]
    found = [("size of the transformer", size_text(size))]
    if before and size:
        found.append(("smaller than before", f"{before / size:.2f}×"))
    if _number(document.get("error")):
        found.append(("relative error", f"{document['error']:.3g}"))
    weights = sum(_weights(layer) for layer in layers)
    if weights:
        stored = 8 * sum(layer.get("bytes") or 0 for layer in layers) / weights
        bits = sum(layer["weight_bits"] * _weights(layer) for layer in layers) / weights
        found.append((f"bits a weight; {stored:.2f} with scales" if stored >= bits else "bits a weight", f"{bits:.2f}"))
    if search.get("forwards") is not None:
        found.append(("forward passes searched", f"{search['forwards']:,}"))
    if search.get("seconds") is not None:
        seconds = search["seconds"]
        found.append(("search time", f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"))
    return found


def layer_map(document: dict[str, Any]) -> str:
    """The maps of all stacks beside what their colours and letters mean."""
    layers = document["layers"]
    if not layers:
        return "<h2>What each layer gets</h2><p>No layer is quantized.</p>"
    found, outside = stacks(layers, document.get("skipped") or {})
    maps = "".join(_map_card(stack.name, draw_stack(stack)) for stack in found)
    lone = _map_card("outside the blocks", draw_outside(outside)) if outside else ""
    holes = any(isinstance(cell, str) for stack in found for cells in stack.rows.values() for cell in cells.values())
    return f'<h2>What each layer gets</h2><div class="maps"><div class="aside">{_legend(layers, holes)}{lone}</div>{maps}</div>'


def _map_card(name: str, drawing: str) -> str:
    return f'<figure class="card"><h3>{escape(name)}</h3><div class="table">{drawing}</div></figure>'


def _legend(layers: list[dict[str, Any]], holes: bool) -> str:
    total = sum(_weights(layer) for layer in layers) or 1
    rows = ""
    for bits in sorted({layer["weight_bits"] for layer in layers}):
        own = [layer for layer in layers if layer["weight_bits"] == bits]
        share = sum(_weights(layer) for layer in own) / total
        size = size_text(sum(layer["bytes"] for layer in own)) if all(layer.get("bytes") is not None for layer in own) else ""
        rows += (
            f'<tr><td><span class="swatch {shade(bits)}"></span>{bits} bits</td><td class="number">{len(own)}</td>'
            f'<td class="number">{share:.0%}</td><td class="number">{size}</td></tr>'
        )
    head = '<tr><th></th><th class="number">layers</th><th class="number">weights</th><th class="number">size</th></tr>'
    table = f'<table class="columns"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    terms = [("128", "weights that share one scale (the group size)")] if any(layer.get("group_size") for layer in layers) else []
    terms += [("ch", "one scale for each output channel")] if any(not layer.get("group_size") for layer in layers) else []
    letters = {letter for layer in layers for letter in marks(layer)}
    terms += [(letter, meaning) for letter, meaning in MEANINGS.items() if letter in letters]
    text = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in terms)
    text += '<dt><span class="swatch alone"></span></dt><dd>left alone, not quantized</dd>' if holes else ""
    note = f"A row is a block, a column a linear layer of it; point at a cell to read all about it. {_activations(layers)}"
    return f'<div class="card legend">{table}<dl>{text}</dl><p class="soft">{escape(note)}</p></div>'


def _activations(layers: list[dict[str, Any]]) -> str:
    """How the inputs of layers are quantized, counted.

    >>> _activations([{"activation_bits": 8}, {"activation_bits": None}, {}])
    'Activations: 8 bits in 1 layer, not quantized in 2 layers.'
    """
    counts: dict[int, int] = {}
    for layer in layers:
        bits = layer.get("activation_bits") or 0
        counts[bits] = counts.get(bits, 0) + 1
    parts = [(f"{bits} bits" if bits else "not quantized") + f" in {_layers(count)}" for bits, count in sorted(counts.items(), reverse=True)]
    return f"Activations: {', '.join(parts)}."


def size_plot(document: dict[str, Any]) -> str:
    """Size against error: the plot, what its marks are, and its named plans as a table."""
    large = max(document["bytes"], document.get("baseline_bytes") or 0) >= 5e9
    unit, scale = ("GB", 1e9) if large else ("MB", 1e6)

    def points(rows: Iterable[dict[str, Any]] | None, name: str) -> list[plots.Point]:
        known = [row for row in rows or [] if _number(row.get("error")) and _number(row.get("bytes"))]
        return [plots.Point(row["bytes"] / scale, row["error"], row.get("name") or name) for row in known]

    chosen = points([document | {"name": "this plan"}], "")
    frontier, evaluated, uniform = points(document.get("frontier"), "predicted"), points(document.get("evaluated"), ""), document.get("uniform")
    evaluated = [point._replace(name=f"measured, number {at}: {point.y:.4g}") for at, point in enumerate(evaluated, 1)]
    frontier.sort()
    frontier = frontier[: -1 : math.ceil(len(frontier) / FRONTIER_POINTS) or 1] + frontier[-1:]
    compared = points(uniform, "")
    if not (frontier or evaluated or compared):
        return ""
    drawing = plots.size_against_error(next(iter(chosen), None), frontier, evaluated, compared, f"size of the transformer, {unit}")
    shown = [
        ("chosen", "this plan", chosen),
        ("uniform", "one scheme everywhere", compared),
        ("tried", "measured during the search", evaluated),
        ("line", "predicted best at each size", len(frontier) > 1),
    ]
    keys = "".join(f'<span><span class="key {kind}"></span>{text}</span>' for kind, text, there in shown if there)
    figures = figure(f'<div class="keys">{keys}</div>{drawing}', "Lower and further left is better")
    return f'<h2>Size against error</h2><div class="plots">{figures}{_compared(document, uniform or [])}</div>'


def _compared(document: dict[str, Any], uniform: list[dict[str, Any]]) -> str:
    if not uniform:
        return ""
    own = document["bytes"], document.get("error")
    plans = [("this plan", *own), *((row.get("name") or "", row["bytes"], row.get("error")) for row in uniform)]
    rows = ""
    for at, (name, size, error) in enumerate(sorted(plans, key=lambda plan: plan[1])):
        this = ' class="this"' if (name, size, error) == plans[0] else ""
        factor = f"{error / own[1]:.2f}×" if _number(error) and _number(own[1]) and own[1] else ""
        shown = f"{error:.3g}" if _number(error) else "not measured"
        cells = "".join(f'<td class="number">{value}</td>' for value in (size_text(size), shown, factor))
        rows += f"<tr{this}><td>{escape(name) or at}</td>{cells}</tr>"
    head = '<tr><th>plan</th><th class="number">size</th><th class="number">error</th><th class="number">vs this plan</th></tr>'
    return f'<div class="card table"><table class="columns"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def worst_layers(layers: list[dict[str, Any]], of: str = "a layer's output on inputs it was not calibrated on") -> str:
    """The layers with the largest errors, then all of them, folded. `of` says what the errors are of."""
    known = sorted((layer for layer in layers if _number(layer.get("error"))), key=lambda layer: -layer["error"])
    text = ""
    if known:
        heading = f"The {WORST} layers with the largest errors" if len(known) > WORST else "Layers by error"
        note = f"Relative error of {of}."
        text = f'<h2>{heading}</h2><p class="soft">{note}</p>{_layer_table(known[:WORST])}'
    if len(layers) > len(known[:WORST]):
        text += (
            f"<details><summary>{'All ' * (len(layers) > 1)}{_layers(len(layers))}, in the model's order</summary>{_layer_table(layers)}</details>"
        )
    return text


def _layer_table(layers: list[dict[str, Any]]) -> str:
    told = [(layer["name"], facts(layer)) for layer in layers]
    columns = [fact for fact in FACTS if any(fact in known for _, known in told)]
    head = "".join(f"<th{_numeric(fact)}>{fact}</th>" for fact in columns)
    rows = ""
    for name, known in told:
        cells = "".join(f"<td{_numeric(fact)}>{escape(known.get(fact, ''))}</td>" for fact in columns)
        rows += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f'<div class="table"><table class="columns layers"><thead><tr><th>layer</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _numeric(name: str) -> str:
    return ' class="number"' if name in NUMERIC else ""


def left_alone(skipped: dict[str, Any]) -> str:
    if not skipped:
        return ""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(reason))}</td></tr>" for name, reason in skipped.items())
    table = (
        f'<div class="table"><table class="columns layers"><thead><tr><th>layer</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    return f"<h2>Left alone</h2><details><summary>{_layers(len(skipped))} not quantized, and why</summary>{table}</details>"


def _recipe(recipe: dict[str, Any]) -> str:
    if not recipe:
        return ""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=140)
    pre, lines = f"<pre>{escape(printable(text))}</pre>", text.count("\n")
    folded = f"<details><summary>{lines} lines of YAML</summary>{pre}</details>" if lines > OPEN_RECIPE_LINES else pre
    return f"<h2>The recipe</h2>{folded}"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _weights(layer: dict[str, Any]) -> int:
    return layer["in_features"] * layer["out_features"]


def _number(value: Any) -> bool:
    """Whether there is a finite value: an error may be missing, null or NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def printable(value: Any) -> Any:
    """The same with every character that prints as nothing (controls, lone surrogates, reversals of direction) replaced by U+FFFD."""
    if isinstance(value, str):
        return "".join("\ufffd" if unicodedata.category(each)[0] == "C" and each not in KEPT else each for each in value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value
