"""The pages that dite writes, in a real browser, from the disk. Where no Chromium is installed these tests are skipped."""

import json

import pytest

from dite_evals.model_report import Files, gather
from dite_evals.model_report_html import render
from dite_evals.plan_html import plan_html
from dite_evals.report import write_report
from tests.evals import test_model_report, test_plan_html, test_reports
from tests.server.chromium import Chromium, find

pytestmark = pytest.mark.skipif(find() is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def model_page(folder):
    ours = test_model_report
    contents = {"q": ours.quantized(), "f": ours.fidelity(), "i": ours.fid(), "b": ours.timed(), "e": ours.exchange()}
    paths = {}
    for name, document in contents.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(document))
    files = Files(paths["q"], [paths["f"], paths["i"]], [paths["b"]], [paths["e"]])
    return render(gather(ours.subject(), files))


def report(document):
    return lambda folder: (folder / "r", write_report(document, folder / "r"))[0].joinpath("report.html").read_text(encoding="utf-8")


PAGES = {
    "fidelity": report(test_reports.fidelity(30)),
    "fid": report(test_reports.fid()),
    "model": model_page,
    "plan": lambda folder: plan_html(test_plan_html.whole()),
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser, browser.tab() as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "telephone"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_in_a_browser_and_asks_for_nothing(tab, tmp_path, name, width):
    path = tmp_path / "page.html"
    path.write_text(PAGES[name](tmp_path), encoding="utf-8")
    tab.look(width)
    tab.open(path.as_uri())
    assert tab.complaints == []
    assert [address for address in tab.requests if not address.startswith("data:")] == []
    assert tab.run("document.title") and tab.run("document.querySelectorAll('h1').length") == 1
    assert tab.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert tab.run("document.documentElement.scrollWidth") <= width, "it has to be scrolled sideways"
