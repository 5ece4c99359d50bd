"""Reports: whole without any other file, readable without a script, and strict JSON."""

import json
import re
from pathlib import Path

import pydantic
import pytest
import torch

from dite.errors import CheckpointError, OutputExists, UsageError
from dite_evals import plots
from dite_evals.compare import compare_reports
from dite_evals.report import Report, headline, read_report, write_report
from dite_evals.report_html import image_tag
from dite_evals.schema import json_schema

EXTRACTOR = "toy/raw/sha256:" + "0" * 64


def fidelity(n=3, size=32, **changes):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    metrics = {
        "n": n,
        "psnr": {"mean": 30.0, "p05": 25.0, "interval": [29.0, 31.0]},
        "ssim": 0.9,
        "latent_relative_error": 0.1,
        "per_step_error": [0.1, 0.2],
        "protocol": "fidelity-128",
        "overrides": {},
        "seconds": 1.0,
    }
    rows = [{"index": i, "seed": i, "condition": i, "psnr": 40.0 - i, "latent_relative_error": 0.1} for i in range(n)]
    configuration = {"protocol": "fidelity-128", "steps": 2, "dtype": None, "model": "<b>&"}
    return Report("fidelity", "a < b", metrics | changes, configuration, ["dite", "eval", "a b"], rows, [], {0: "<ship>"}, images, images.flip(-1))


def fid(value=5.0, extractor=EXTRACTOR, n=20):
    metrics = {"fid": value, "n": n, "interval": [value - 1, value + 1], "fid_infinity": value - 2, "extractor": extractor, "protocol": "smoke"}
    metrics |= {"overrides": {}, "seconds": 1.0, "left_out": {"kid": "<why>"}}
    curve = [(20, value), (10, value + 1), (6, value + 2), (5, value + 3), (4, value + 4)]
    sheet = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    return Report("fid", "fid", metrics, {"protocol": "smoke", "steps": 4}, [], curve=curve, images=sheet, replicates=replicates(value))


def replicates(value, noise=0.1, parts="all but one of 4 groups"):
    return {"fid": {"values": [value + noise * one for one in (-1, 0.5, 0.2, 0.3)], "fraction": 0.75, "parts": parts}}


def page_of(report, folder):
    return Path(write_report(report, folder)["html"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("report", [fidelity(), fidelity(1), fidelity(30), fid()], ids=["three", "one", "many", "fid"])
def test_the_page_refers_to_nothing_outside_itself(report, tmp_path):
    page = page_of(report, tmp_path)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        page = page.replace(source, "")
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(|<iframe|href=|srcset=", page)


def test_what_users_typed_is_escaped(tmp_path):
    page = page_of(fidelity(), tmp_path)
    assert "<ship>" not in page and "&lt;ship&gt;" in page and "&lt;b&gt;&amp;" in page


def test_the_worst_samples_come_first_and_at_most_24(tmp_path):
    page = page_of(fidelity(30), tmp_path)
    shown = [float(value) for value in re.findall(r"<b>([\d.]+)&nbsp;dB</b>", page)]
    assert len(shown) == 24 and shown == sorted(shown) and shown[0] == 11.0


def test_large_images_are_shown_small_and_small_ones_as_they_are():
    assert 'width="256" height="128"' in image_tag(torch.zeros(3, 512, 1024, dtype=torch.uint8), "x")
    assert 'class="pixels" width="32" height="32"' in image_tag(torch.zeros(3, 32, 32, dtype=torch.uint8), "x")


def test_the_json_is_strict_even_where_a_figure_is_not_finite(tmp_path):
    paths = write_report(fidelity(latent_relative_error=float("inf")), tmp_path)
    document = json.loads(Path(paths["json"]).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert document["metrics"]["latent_relative_error"] is None and document["schema_version"] == 2
    assert document["command"] == "dite eval 'a b'" and torch.__version__.startswith(document["environment"]["torch"])
    assert read_report(tmp_path) == document


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    write_report(fidelity(), tmp_path / "r")
    write_report(fid(), tmp_path / "r")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["protocol.yaml", "report.html", "report.json", "report.md"]
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputExists, match="no report"):
        write_report(fidelity(), tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 99, "metrics": {}}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_report(tmp_path)


def test_two_reports_of_one_protocol_compare(tmp_path):
    write_report(fid(5.0), tmp_path / "a")
    write_report(fid(9.0), tmp_path / "b")
    comparison = compare_reports(tmp_path / "a", tmp_path / "b" / "report.json")
    row = comparison["rows"][0]
    assert (row["metric"], row["a"], row["b"], row["difference"]) == ("fid", 5.0, 9.0, 4.0)
    assert row["interval"] == pytest.approx([4.0, 4.0])  # the same groups move both alike
    assert "the two differ" in comparison["verdict"]


def test_metrics_of_other_reference_features_are_left_out_of_a_comparison(tmp_path):
    for name, kept in (("a", "1" * 64), ("b", "2" * 64)):
        report = fid()
        report.metrics["kid"] = 0.1
        report.configuration["reference_features_sha256"] = kept
        write_report(report, tmp_path / name)
    metrics = [row["metric"] for row in compare_reports(tmp_path / "a", tmp_path / "b")["rows"]]
    assert "fid" in metrics and "kid" not in metrics
    assert "kid" in [row["metric"] for row in compare_reports(tmp_path / "a", tmp_path / "a")["rows"]]


def test_a_difference_within_its_interval_is_none(tmp_path):
    write_report(fid(5.0), tmp_path / "a")
    other = fid(5.01)
    other.replicates["fid"]["values"].reverse()
    write_report(other, tmp_path / "b")
    comparison = compare_reports(tmp_path / "a", tmp_path / "b")
    low, high = comparison["rows"][0]["interval"]
    assert low < 0 < high and "does not tell" in comparison["verdict"]


def test_paired_samples_tell_apart_what_intervals_of_the_means_do_not(tmp_path):
    one, other = fidelity(6), fidelity(6)
    for row in other.samples:
        row["psnr"] -= 0.3 + 0.01 * row["index"]
    other.metrics["psnr"] = {"mean": 29.7, "p05": 24.7, "interval": [28.7, 30.7]}
    write_report(one, tmp_path / "a")
    write_report(other, tmp_path / "b")
    comparison = compare_reports(tmp_path / "a", tmp_path / "b")
    assert "the two differ" in comparison["verdict"] and comparison["rows"][0]["interval"][1] < 0


def test_reports_whose_groups_differ_are_compared_without_an_interval(tmp_path):
    write_report(fid(5.0), tmp_path / "a")
    other = fid(9.0)
    other.replicates = replicates(9.0, parts="all but one of 5 groups")
    write_report(other, tmp_path / "b")
    comparison = compare_reports(tmp_path / "a", tmp_path / "b")
    assert comparison["rows"][0]["interval"] is None and "no interval" in comparison["verdict"]


def test_a_report_read_back_has_the_same_headline_even_where_a_figure_is_not_finite(tmp_path):
    report = fidelity(latent_relative_error=float("inf"))
    names = [name for name, _ in headline(report.metrics)]
    write_report(report, tmp_path)
    found = dict(headline(read_report(tmp_path)["metrics"]))
    assert list(found) == names and found["latent relative error"] == "not finite" and found["PSNR, mean"] == "30.00 dB"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda document: document["metrics"].pop("fid"), "metrics.fid"),
        (lambda document: document["metrics"].update(n="many"), "metrics.n"),
        (lambda document: document["metrics"].update(interval=[1.0]), "metrics.interval"),
        (lambda document: document["replicates"]["fid"].update(fraction=1.5), "replicates.fid.fraction"),
        (lambda document: document.pop("configuration"), "configuration"),
    ],
)
def test_a_damaged_report_is_refused_with_the_place(tmp_path, change, where):
    path = Path(write_report(fid(), tmp_path)["json"])
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=where):
        read_report(path)


@pytest.mark.skipif(tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11), reason="pydantic before 2.11 writes the same schema in other words")
def test_the_published_schema_is_the_one_that_is_checked():
    published = Path(__file__).parents[2] / "docs" / "report.schema.json"
    assert json.loads(published.read_text()) == json_schema(), "python -m dite_evals.schema > docs/report.schema.json"


def test_what_was_left_out_is_said_with_its_reason(tmp_path):
    paths = write_report(fid(), tmp_path)
    assert "&lt;why&gt;" in Path(paths["html"]).read_text() and r"\<why\>" in Path(paths["md"]).read_text()


@pytest.mark.parametrize("other", [fid(extractor="other/raw/sha256:11"), fid(n=30), fidelity()], ids=["extractor", "n", "kind"])
def test_figures_of_other_extractors_sizes_or_kinds_are_not_compared(tmp_path, other):
    write_report(fid(), tmp_path / "a")
    write_report(other, tmp_path / "b")
    with pytest.raises(UsageError, match="can't be compared"):
        compare_reports(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("values", [[30.0], [30.0, 30.0], [100.0, float("inf")], [1.0, 2.0, 900.0]])
def test_a_histogram_of_anything_is_drawn_inside_its_frame(values):
    drawing = plots.histogram(values, 30.0, "PSNR, dB")
    assert "nan" not in drawing and "inf" not in drawing
    assert all(-1 <= float(x) <= plots.WIDTH for x in re.findall(r'<rect class="bar" x="([^"]+)"', drawing))


@pytest.mark.parametrize("errors", [[0.0], [0.0, 0.0], [float("inf"), 0.5], list(range(1, 101))])
def test_the_plot_per_step_of_anything_is_drawn(errors):
    drawing = plots.per_step([float(error) for error in errors])
    assert drawing.endswith("</svg>") and "nan" not in drawing and "inf" not in drawing


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (-3, 7e5), (55.1, 55.2), (0, 1e-9)])
def test_ticks_lie_on_round_numbers_within_the_range(low, high):
    found = plots.ticks(low, high)
    assert 1 <= len(found) <= 12 and found == sorted(set(found))
