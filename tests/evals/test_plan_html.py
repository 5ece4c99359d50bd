"""The page of a plan: whole without any other file, drawn for any model, and deaf to what names try to say."""

import math
import re
from xml.etree import ElementTree

import pytest

from dite_evals import plots
from dite_evals.plan_html import plan_html
from dite_evals.plan_map import short_names, stacks

LINEARS = {
    "norm1.emb.timestep_embedder.linear_1": ("conditioning", 256, 256),
    "norm1.emb.timestep_embedder.linear_2": ("conditioning", 256, 256),
    "norm1.linear": ("conditioning", 256, 1536),
    "attn1.to_q": ("token", 256, 256),
    "attn1.to_k": ("token", 256, 256),
    "attn1.to_v": ("token", 256, 256),
    "attn1.to_out.0": ("token", 256, 256),
    "ff.net.0.proj": ("token", 256, 1024),
    "ff.net.2": ("token", 1024, 256),
}


def layer(name, kind="token", in_features=256, out_features=256, **changes):
    found = {"name": name, "kind": kind, "in_features": in_features, "out_features": out_features, "weight_bits": 4, "activation_bits": 8}
    found |= {"group_size": 128, "transform": "none", "rank": 0, "rounding": "gptq", "error": 0.03, "bytes": in_features * out_features * 9 // 16}
    return found | changes


def spread_layers(blocks):
    """A plan as a search leaves it: more bits where blocks begin and end, transforms here and there."""
    found = []
    for block in range(blocks):
        for at, (linear, (kind, *shape)) in enumerate(LINEARS.items()):
            dice = (block * 31 + at * 17) % 23
            bits = 8 if dice < 4 or (block in (0, blocks - 1) and at < 4) else 6 if dice < 9 else 4
            changes = {"weight_bits": bits, "group_size": (32, 64, 128, None)[dice % 4], "error": 0.11 / bits + dice / 900, "rank": 16 * (dice == 13)}
            changes |= {"transform": ("none", "hadamard", "smooth", "smooth+hadamard")[(block + at) % 4] if kind == "token" else "none"}
            changes |= {"activation_bits": 8 if kind == "token" else None, "bytes": math.prod(shape) * (bits + 0.5) // 8}
            found.append(layer(f"transformer_blocks.{block}.{linear}", kind, *shape, **changes))
    return found


def whole(blocks=10, **changes):
    """A document with everything in it."""
    error = [0.0062 * (31.7 / size) ** 2.2 for size in (11.2 + step / 4 for step in range(36))]
    frontier = [{"bytes": int((11.2 + step / 4) * 1e6), "error": value} for step, value in enumerate(error)]
    evaluated = [{"bytes": 13.1e6 - 7e4 * (step % 9), "error": 0.0143 + 0.004 * math.exp(-step / 12) + 0.0006 * (step % 5)} for step in range(48)]
    uniform = [
        ("W4 g128", 13.1e6, 0.041),
        ("W4 g64", 13.2e6, 0.039),
        ("W4 g32", 13.6e6, 0.034),
        ("W6 g128", 16.1e6, 0.011),
        ("W8 g128", 18.9e6, 0.005),
    ]
    document = {
        "format_version": 1,
        "model": {"class": "DiTTransformer2DModel", "linears": "0" * 64},
        "recipe": {
            "name": "w4a8-searched",
            "defaults": {"token": {"weight": {"num_bits": 4, "group_size": 128}, "activation": {"num_bits": 8}}, "conditioning": {"weight": None}},
            "search": {"strategy": "dp", "budget": {"kind": "bytes", "limit": 13100000}},
            "layers": {"*.norm1.emb.*": {"weight": {"num_bits": 8}}},
        },
        "search": {
            "strategy": "dp",
            "fitness": "surrogate",
            "budget": {"kind": "bytes", "limit": 13.1e6},
            "seed": 0,
            "forwards": 12345,
            "seconds": 52.1,
        },
        "bytes": 13.1e6,
        "baseline_bytes": 31.7e6,
        "error": 0.0143,
        "uniform": [{"name": name, "bytes": size, "error": value} for name, size, value in uniform],
        "frontier": [{"bytes": row["bytes"], "error": row["error"] * 0.3} for row in frontier],
        "evaluated": evaluated,
        "layers": [*spread_layers(blocks), layer("proj_out_1", "conditioning", 256, 512)],
        "skipped": {"pos_embed.proj": "not a linear", "proj_out_2": "outside the blocks; a pattern of the recipe may name it"},
    }
    return document | changes


def ragged(**changes):
    """The least a document may hold."""
    only = {"name": "lin", "in_features": 4, "out_features": 4, "weight_bits": 4}
    return {
        "format_version": 1,
        "model": {"class": "Tiny"},
        "bytes": 100,
        "baseline_bytes": None,
        "error": None,
        "search": None,
        "layers": [only],
    } | changes


def nulls():
    """Optional keys that are there and hold nothing."""
    empty = dict.fromkeys(("uniform", "frontier", "evaluated", "skipped", "recipe"))
    bare = layer("b.0.x", group_size=None, activation_bits=None, error=None, bytes=None, transform=None, rounding=None, rank=None, sensitivity=None)
    return ragged(layers=[bare], **empty)


def drawings(page):
    """Every `<svg>` of a page, parsed: what is not well-formed raises."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def cells(page):
    return [group for drawing in drawings(page) for group in drawing.iter("g") if "cell" in group.get("class", "")]


@pytest.mark.parametrize(
    "document", [whole(), whole(28), ragged(), nulls(), ragged(layers=[])], ids=["ten blocks", "28 blocks", "ragged", "nulls", "none"]
)
def test_the_page_is_whole_and_every_layer_is_a_cell(document):
    page = plan_html(document)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(|<iframe|href=|src=|srcset=", page)
    assert len(cells(page)) == len(document["layers"])
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_a_cell_shows_bits_group_and_marks_and_tells_the_rest():
    chosen = layer("blocks.3.fc", weight_bits=6, group_size=None, transform="smooth+hadamard", rank=16, sensitivity=0.25)
    (cell,) = cells(plan_html(ragged(layers=[chosen])))
    assert "bits6" in cell.get("class") and [text.text for text in cell.iter("text")] == ["ch", "SHL"]
    told = cell.find("title").text
    assert told.startswith("blocks.3.fc\n") and "activations: 8 bits" in told and "rank 16" in told and "sensitivity: 0.25" in told


def test_rows_and_columns_stay_in_model_order_where_blocks_differ():
    names = ["head", "double.0.a", "double.0.c", "double.1.a", "double.1.b", "double.1.c", "single.10.x", "single.9.x", "norm.linear"]
    found, outside = stacks([layer(name) for name in names], {"single.11.x": "small", "elsewhere.0.x": "small"})
    assert [(stack.name, stack.columns, list(stack.rows)) for stack in found] == [
        ("double", ["a", "b", "c"], [0, 1]),
        ("single", ["x"], [9, 10, 11]),
    ]
    assert found[1].rows[11]["x"] == "small" and [each["name"] for each in outside] == ["head", "norm.linear"]


def test_a_layer_left_alone_within_the_blocks_is_an_empty_cell_and_is_listed():
    page = plan_html(whole(skipped={"transformer_blocks.10.attn1.to_q": "too <sensitive>"}))
    (alone,) = [group for drawing in drawings(page) for group in drawing.iter("g") if group.get("class") == "alone"]
    assert alone.find("title").text.endswith("left alone: too <sensitive>")
    assert "1 layer not quantized" in page and "<td>too &lt;sensitive&gt;</td>" in page


def test_what_a_document_names_is_text_and_nothing_else():
    evil = '"><script>alert(1)</script>\x00\u202e\ud800&'
    layers = [
        layer(name, kind=evil, transform=evil, rounding=evil)
        for name in (evil, f"{evil}.0.{evil}", f"blocks.0.{evil}", "a" * 3000, "0.0.0", "b.9999999999.c", "")
    ]
    document = whole(model={"class": evil}, layers=layers, skipped={evil: evil, f"blocks.0.{evil}x": evil}, recipe={"name": evil, evil: [evil]})
    document["uniform"][0]["name"] = evil
    page = plan_html(document | {"search": {"strategy": evil, "fitness": evil, "budget": {"kind": evil, "limit": 3.0}}})
    page.encode()
    assert "<script" not in page and "\x00" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    assert len(cells(page)) == len(layers) and not re.search(r'class="[^"]*script', page)


def test_the_ten_largest_errors_come_first_and_all_layers_follow_folded():
    page = plan_html(whole())
    first = page.partition("largest errors</h2>")[2].partition("<details>")[0]
    errors = [float(value) for value in re.findall(r'<td class="number">([\d.]+)</td></tr>', first)]
    assert len(errors) == 10 and errors == sorted(errors, reverse=True)
    assert "All 91 layers" in page


def test_the_summary_says_what_uniform_bits_would_have_cost_whichever_is_better():
    assert "(W4 g128, 13.1 MB) has 0.041, 2.9 times that of this plan." in plan_html(whole())
    assert "0.041, less: this plan&#x27;s is 2 times as large." in plan_html(whole(error=0.082))
    assert "one scheme" not in plan_html(ragged())


@pytest.mark.parametrize("missing", ["uniform", "frontier", "evaluated", "error"])
def test_the_plot_is_drawn_from_what_there_is(missing):
    (drawing,) = [each for each in drawings(plan_html(whole(**{missing: None}))) if each.get("class") is None]
    assert drawing.get("aria-label").startswith("relative error against size")


@pytest.mark.parametrize("values", [[0.0], [0.0, 1.0], [0.1], [1e-9, 1e9], [0.1, 0.1, 0.1], [0.02, 0.03]])
def test_plans_of_any_error_lie_inside_the_frame(values):
    points = [plots.Point(10.0 + at, value, f"W{at}") for at, value in enumerate(values)]
    drawing = ElementTree.fromstring(plots.size_against_error(points[0], points, points, points, "size, MB"))
    places = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in drawing.iter("circle")]
    assert all(plots.LEFT <= x <= plots.WIDTH - plots.RIGHT and plots.TOP <= y <= plots.HEIGHT - plots.BOTTOM for x, y in places)


@pytest.mark.parametrize(("high", "ticks"), [(0.04, ["0", "0.01", "0.02", "0.03", "0.04"]), (0.4, ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])])
def test_errors_that_differ_much_get_a_logarithmic_axis(high, ticks):
    drawing = ElementTree.fromstring(plots.size_against_error(None, [], [plots.Point(1, 0.01, "a"), plots.Point(2, high, "b")], [], "MB"))
    assert [text.text for text in drawing.iter("text") if text.get("text-anchor") == "end"] == ticks


def test_a_frontier_of_any_length_is_drawn_short_and_whole():
    long = [{"bytes": 1e6 * (10 + at / 1000), "error": 1 / (1 + at)} for at in range(5000)]
    pages = [plan_html(whole(frontier=frontier)) for frontier in (long, [long[0], long[-1]])]
    drawn, ends = (next(mark.get("points").split() for drawing in drawings(page) for mark in drawing.iter("polyline")) for page in pages)
    assert 200 <= len(drawn) <= 301 and len(ends) == 2
    assert [drawn[0], drawn[-1]] == ends


def test_labels_of_crowded_plans_do_not_overlap_and_lie_inside():
    crowd = [plots.Point(13 + at / 10, 0.04 - at / 1000, f"W4 g{at}") for at in range(12)]
    drawing = ElementTree.fromstring(plots.size_against_error(plots.Point(13.0, 0.01, "this plan"), [], [], crowd, "MB"))
    boxes = []
    for text in drawing.iter("text"):
        if "beside" in text.get("class", ""):
            x, y, width = float(text.get("x")), float(text.get("y")), 7 * len(text.text)
            left = {"start": x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor")]
            boxes.append((left, y - 10, left + width, y))
    assert len(boxes) > 3 and all(box[0] >= plots.LEFT and box[2] <= plots.WIDTH for box in boxes)
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for at, a in enumerate(boxes) for b in boxes[:at])


def test_short_names_keep_both_ends_and_differ():
    long = [f"{'x' * 30}.{at}.{'y' * 30}{at}" for at in range(3)]
    short = short_names([*long, "ff.net.2"])
    assert len(set(short)) == 4 and all(len(name) <= 21 for name in short) and short[3] == "ff.net.2"
