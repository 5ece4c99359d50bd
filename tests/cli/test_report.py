"""`dite report` on what the other commands really write."""

import json

import pytest

from dite.cli import report


@pytest.fixture(scope="module")
def call():
    """`run` for fixtures that live longer than a test: returns the document that `--json` prints."""
    import contextlib
    import io

    from dite.cli import main

    def run(*arguments):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main([*map(str, arguments), "--json"])
        assert code == 0, out.getvalue()
        return json.loads(out.getvalue())

    return run


@pytest.fixture(scope="module")
def measured(model_folder_once, tmp_path_factory, call):
    """A quantized model with all that was measured of it, written by the commands themselves."""
    home = tmp_path_factory.mktemp("measured")
    model = home / "w8a8"
    quantized = call("quantize", model_folder_once, "--recipe", "w8a8", "--effort", "fast", "-o", model)
    (home / "quantize.json").write_text(json.dumps(quantized))
    few = ("--n", 2, "--steps", 2)
    call("eval", "fidelity", model, "--baseline", model_folder_once, *few, "-o", home / "fidelity")
    call("eval", "fidelity", model, "--baseline", model_folder_once, *few, "--dtype", "bfloat16", "-o", home / "bfloat16")
    call("eval", "fidelity", model_folder_once, "--baseline", model_folder_once, *few, "-o", home / "original")
    call("bench", "forward", model_folder_once, "--recipes", "w8a8", "--rounds", 1, "-o", home / "forward.json")
    return home


@pytest.fixture
def files(measured):
    return ("--quantization", measured / "quantize.json", "--eval", measured / "fidelity", "--bench", measured / "forward.json")


def test_one_page_gathers_what_the_commands_wrote(run, measured, files, tmp_path):
    outcome = run("report", measured / "w8a8", *files, "-o", tmp_path / "page", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert [one["section"] for one in document["not_measured"]] == ["fid", "exchange"]
    told = json.loads((measured / "quantize.json").read_text())
    assert (document["quantization"]["bytes"], document["quantization"]["baseline_bytes"]) == (told["bytes"], told["baseline_bytes"])
    assert {layer["name"]: layer["bytes"] for layer in document["quantization"]["layers"]} == {one["name"]: one["bytes"] for one in told["layers"]}
    assert document["quantization"]["skipped"] == told["skipped"]
    assert document["fidelity"][0]["metrics"]["n"] == 2 and document["speed"][0]["rows"]
    assert json.loads((tmp_path / "page" / "report.json").read_text()) == {key: value for key, value in document.items() if key != "report"}
    assert "w8a8 on auto" in (tmp_path / "page" / "report.html").read_text() and "w8a8 on auto" in (tmp_path / "page" / "report.md").read_text()


def test_without_files_the_page_says_what_would_measure_each_section(run, measured, tmp_path):
    outcome = run("report", measured / "w8a8", "-o", tmp_path / "page")
    assert outcome.code == 0 and f"fidelity not measured: dite eval fidelity {measured / 'w8a8'} --baseline BASE" in outcome.out


def test_a_report_in_another_precision_is_checked_in_that_precision(run, measured, tmp_path):
    outcome = run("report", measured / "w8a8", "--eval", measured / "fidelity", "--eval", measured / "bfloat16", "-o", tmp_path / "page", "--json")
    assert outcome.code == 0, outcome.err
    digests = outcome.document["model"]["sha256"]
    assert digests.keys() == {"float32", "bfloat16"} and len(set(digests.values())) == 2


def test_a_report_of_the_original_is_refused_with_both_digests(run, measured, tmp_path):
    theirs = json.loads((measured / "original" / "report.json").read_text())["configuration"]["model_sha256"]
    ours = json.loads((measured / "fidelity" / "report.json").read_text())["configuration"]["model_sha256"]
    outcome = run("report", measured / "w8a8", "--eval", measured / "original", "-o", tmp_path / "page", "--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "UsageError"
    assert theirs in outcome.document["error"]["why"] and ours in outcome.document["error"]["why"] and not (tmp_path / "page").exists()


def test_a_model_that_is_not_quantized_gets_a_page_too(run, measured, model_folder_once, tmp_path):
    outcome = run("report", model_folder_once, "--eval", measured / "original", "-o", tmp_path / "page", "--json")
    assert outcome.code == 0 and outcome.document["quantization"] is None


def test_an_exchange_carries_the_digest_that_the_page_asks_for(run, measured, tmp_path, monkeypatch):
    """What `dite generate` adds on several ranks; the ranks themselves are tests/cli/test_nproc.py's."""
    from contextlib import contextmanager

    from dite.cli import generate

    told = {"ranks": 2, "mode": "kv_gather", "codec": "int4", "order": 2, "bytes_sent": 250, "bytes_raw": 1000}

    @contextmanager
    def shared(self, pipe):
        yield told

    monkeypatch.setattr(generate.Sharing, "share", shared)
    drawn = run("generate", measured / "w8a8", "--class", 1, "--steps", 2, "-o", tmp_path / "pictures", "--json")
    assert drawn.code == 0, drawn.err
    (tmp_path / "generate.json").write_text(drawn.out)
    outcome = run("report", measured / "w8a8", "--exchange", tmp_path / "generate.json", "-o", tmp_path / "page", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["exchange"][0]["exchange"] == told
    assert outcome.document["exchange"][0]["command"].startswith("dite generate ")


def test_a_file_that_is_not_there_is_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_subject", lambda model: pytest.fail("the model was loaded"))
    outcome = run("report", "no/model", "--bench", tmp_path / "none.json", "-o", tmp_path / "page")
    assert outcome.code == 2 and "no file" in outcome.err


def test_the_report_of_an_evaluation_is_never_written_over(run, measured, monkeypatch):
    monkeypatch.setattr(report, "_subject", lambda model: pytest.fail("the model was loaded"))
    outcome = run("report", measured / "w8a8", "--eval", measured / "fidelity", "-o", measured / "fidelity")
    assert outcome.code == 2 and "holds another report" in outcome.err
