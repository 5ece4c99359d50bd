"""Reports: whole without any other file, readable without a script, and strict JSON."""

import json
import re
from pathlib import Path

import pytest
import torch

from dite.errors import CheckpointError, OutputExists, UsageError
from dite_evals import plots
from dite_evals.compare import compare_reports
from dite_evals.report import Report, read_report, write_report
from dite_evals.report_html import image_tag

EXTRACTOR = "toy/raw/sha256:" + "0" * 64


def fidelity(n=3, size=32, **changes):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    metrics = {
        "n": n,
        "psnr": {"mean": 30.0, "p05": 25.0, "interval": [29.0, 31.0]},
        "ssim": 0.9,
        "latent_relative_error": 0.1,
        "per_step_error": [0.1, 0.2],
    }
    rows = [{"index": i, "seed": i, "condition": i, "psnr": 40.0 - i, "latent_relative_error": 0.1} for i in range(n)]
    configuration = {"protocol": "fidelity-128", "steps": 2, "dtype": None, "model": "<b>&"}
    return Report("fidelity", "a < b", metrics | changes, configuration, ["dite", "eval", "a b"], rows, [], {0: "<ship>"}, images, images.flip(-1))


def fid(value=5.0, extractor=EXTRACTOR, n=20):
    metrics = {"fid": value, "n": n, "interval": [value - 1, value + 1], "fid_infinity": value - 2, "extractor": extractor, "protocol": "smoke"}
    curve = [(20, value), (10, value + 1), (6, value + 2), (5, value + 3), (4, value + 4)]
    return Report("fid", "fid", metrics, {"protocol": "smoke", "steps": 4}, [], curve=curve, images=torch.zeros(20, 3, 8, 8, dtype=torch.uint8))


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
    assert document["metrics"]["latent_relative_error"] is None and document["schema_version"] == 1
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
    assert comparison["rows"][0] == {"metric": "fid", "a": 5.0, "b": 9.0, "difference": 4.0}
    assert "do not overlap" in comparison["verdict"]


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
