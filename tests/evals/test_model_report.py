"""A model's page: only figures of this model, each with what it depends on; whole without any other file."""

import copy
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pydantic
import pytest

from dite.errors import CheckpointError, OutputExists, UsageError
from dite_evals import plots
from dite_evals.model_pages import markdown, write_model_report
from dite_evals.model_report import Files, Subject, gather, sqnr
from dite_evals.model_report_html import render
from dite_evals.model_schema import json_schema
from dite_evals.schema import SCHEMA_VERSION

OURS = {"bfloat16": "a" * 64, "float32": "b" * 64}
THEIRS = "c" * 64
EXTRACTOR = "toy/raw/sha256:" + "0" * 64


def layer(name, kind="token", **changes):
    found = {"name": name, "kind": kind, "in_features": 48, "out_features": 192, "weight_bits": 4, "activation_bits": 8, "group_size": 128}
    return found | {"transform": "none", "rank": 0, "rounding": None, "error": None, "error_of": None, "bytes": 5000} | changes


LAYERS = [layer("blocks.0.ff"), layer("blocks.0.norm", "conditioning", weight_bits=8, activation_bits=None, group_size=64), layer("blocks.1.ff")]


def subject(**changes):
    facts = {"model_class": "DiTTransformer2DModel", "pipeline": "DiTPipeline", "parameters": 27_648, "dtype": "bfloat16", "bytes": 20_000}
    linears = [{key: one[key] for key in ("name", "kind", "in_features", "out_features")} for one in LAYERS]
    sizes = {"bytes": 20_000, "baseline_bytes": 60_000}
    known = {"source": "my-w4a8", "facts": facts, "dtype": "bfloat16", "digest": OURS.get, "recipe": "w4a8", "layers": LAYERS, "sizes": sizes}
    return Subject(**known | {"linears": linears, "skipped": {"proj_out": "the last layer <b>"}} | changes)


def fidelity(**configuration):
    metrics = {"n": 16, "psnr": {"mean": 42.5, "p05": 40.0, "interval": [41.5, 43.5]}, "ssim": 0.99, "latent_relative_error": 0.03}
    metrics |= {"per_step_error": [0.01, 0.02], "protocol": "fidelity-128", "overrides": {}, "seconds": 1.0}
    known = {
        "model_sha256": OURS["bfloat16"],
        "dtype": "bfloat16",
        "steps": 50,
        "guidance": 4.0,
        "seed": 0,
        "baseline": "base",
        "baseline_sha256": THEIRS,
    }
    return _report("fidelity", metrics, known | configuration)


def fid(**configuration):
    metrics = {"fid": 6.42, "n": 5000, "interval": [6.18, 6.65], "extractor": EXTRACTOR, "protocol": "cifar10-5k", "overrides": {}, "seconds": 9.0}
    known = {"model_sha256": OURS["float32"], "dtype": "float32", "steps": 20, "guidance": 1.5, "seed": 0, "protocol": "cifar10-5k"}
    curve = [{"n": 5000 // count, "fid": 6 + count / 10} for count in range(1, 6)]
    return _report("fid", metrics, known | {"reference": "cifar10 train", "reference_n": 50_000} | configuration) | {"curve": curve}


def _report(kind, metrics, configuration):
    document = {"schema_version": SCHEMA_VERSION, "kind": kind, "title": "t", "metrics": metrics, "configuration": configuration}
    return document | {"environment": {"torch": "2"}, "command": f"dite eval {kind} my-w4a8"}


def timed(op="forward", shape=(32, 48, 192), **changes):
    row = {
        "name": "w4a8 on auto",
        "op": op,
        "backend": "cpu",
        "weight_bits": 4,
        "activation_bits": 8,
        "group_size": 128,
        "recipe": "w4a8",
        "layers": 3,
    }
    row |= {"weight_bytes": 20_000, "held_bytes": 30_000, "shape": list(shape), "us": {"p20": 900.0, "p50": 1000.0, "p80": 1100.0}}
    row |= {"baseline": "torch-bf16-eager", "ratio_to_baseline": 1.75, "output_relative_error": 0.03}
    return {"command": f"dite bench {op}", "model": "base", "batch_size": 2, "environment": {"torch": "2", "threads": 1}, "rows": [row | changes]}


def exchange(**changes):
    row = {"mode": "ring", "codec": "int4", "link": "unshaped", "seconds_per_step": 0.5, "keyframe_seconds": 0.6, "bytes_per_step": 23_000}
    row |= {"latent_relative_error": 0.01, "ratio_to_one_device": 0.5, "ratio_to_best_raw_synchronous": None}
    configuration = {"model": "my-w4a8", "ranks": 2, "steps": 6, "rounds": 3, "batch_size": 1, "dtype": "bfloat16"}
    document = {"command": "dite bench exchange my-w4a8", "environment": {}, "configuration": configuration, "rows": [row]}
    return document | {"model_sha256": OURS["bfloat16"]} | changes


def generated(**changes):
    told = {"ranks": 2, "mode": "kv_gather", "codec": "int4", "order": 2, "bytes_sent": 250, "bytes_raw": 1000}
    document = {"images": ["a.png", "b.png"], "steps": 20, "guidance": 4.0, "seconds": 2.0, "seconds_per_step": 0.1, "exchange": told}
    return document | {"dtype": "bfloat16", "model_sha256": OURS["bfloat16"], "command": "dite generate my-w4a8 --nproc 2"} | changes


def quantized(**changes):
    layers = [one | {"error": 0.1 / at, "error_of": "outputs"} for at, one in enumerate(LAYERS, 1)]
    return {"layers": layers, "seconds": 43.0, "peak_memory_bytes": 7e8, "notes": []} | changes


@pytest.fixture
def put(tmp_path):
    """Write a document into a file."""

    def call(document, name="one.json"):
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return call


@pytest.fixture
def whole(put):
    """The document of a model of which everything was measured."""
    evals = [put(fidelity(), "f.json"), put(fid(), "i.json")]
    benches = [put(timed(), "b.json"), put(timed("linear"), "l.json")]
    return gather(subject(), Files(put(quantized(), "q.json"), evals, benches, [put(exchange(), "e.json"), put(generated(), "g.json")]))


def test_everything_measured_is_on_the_page_and_nothing_is_missing(whole):
    assert whole["not_measured"] == []
    page = render(whole)
    for figure in ("42.5 dB", "41.5 to 43.5", "6.42 (6.18 to 6.65)", "1.75×", "25.0%", "3.00×"):
        assert figure in page and figure in markdown(whole), figure


def test_every_block_says_what_it_depends_on(whole):
    for page in (render(whole), markdown(whole)):
        for word in ("N = 16", "N = 5000", EXTRACTOR, "50 steps", "guidance 1.5", "model aaaaaaaaaaaa…", "model bbbbbbbbbbbb…", "2 ranks"):
            assert word in page, word
        for command in ("eval fidelity", "eval fid ", "bench forward", "bench linear", "bench exchange", "generate"):
            assert f"dite {command}" in page, command
        assert all(digest in page for digest in OURS.values())


def test_what_a_run_changed_in_its_protocol_is_said(put):
    report = fid()
    report["metrics"]["overrides"] = {"n": 5000, "steps": 20}
    assert "changed from cifar10-5k: n, steps" in markdown(gather(subject(), Files(evals=[put(report)])))


def test_layers_that_are_quantized_alike_are_counted_with_their_sqnr(whole):
    first, second = whole["quantization"]["kinds"]
    assert (first["kind"], first["layers"], first["weights"]) == ("token", 2, 2 * 48 * 192)
    assert first["bits_per_weight"] == pytest.approx(8 * 10_000 / (2 * 48 * 192))
    assert first["sqnr_db"] == {"median": pytest.approx((sqnr(0.1) + sqnr(0.1 / 3)) / 2), "worst": pytest.approx(20.0)}
    assert (second["weight_bits"], second["activation_bits"], second["group_size"]) == (8, None, 64)


def test_nothing_measured_names_the_command_of_each_section():
    document = gather(subject(), Files())
    commands = {entry["section"]: entry["command"] for entry in document["not_measured"]}
    assert commands.keys() == {"error of each layer", "fidelity", "fid", "speed", "exchange"}
    assert commands["fidelity"].startswith("dite eval fidelity my-w4a8 --baseline BASE")
    assert commands["speed"].startswith("dite bench forward BASE --recipes w4a8")
    page = render(document)
    assert page.count("Not measured. To measure it:") == 4 and all(command.split(";")[0].split(">")[0] in page for command in commands.values())


def test_the_original_named_by_one_report_is_named_in_the_other_commands(put):
    document = gather(subject(), Files(evals=[put(fidelity(baseline="facebook/DiT"))]))
    assert "dite bench forward facebook/DiT" in next(one["command"] for one in document["not_measured"] if one["section"] == "speed")


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        ("evals", fidelity(model_sha256=THEIRS)),
        ("evals", fid(model_sha256=THEIRS)),
        ("exchanges", exchange(model_sha256=THEIRS)),
        ("exchanges", generated(model_sha256=THEIRS)),
        ("benches", exchange(model_sha256=THEIRS)),
    ],
)
def test_a_figure_of_another_model_is_refused_with_both_digests(put, kind, document):
    with pytest.raises(UsageError, match="measured on another model") as raised:
        gather(subject(), Files(**{kind: [put(document)]}))
    assert THEIRS in raised.value.why and OURS[document.get("dtype") or document["configuration"]["dtype"]] in raised.value.why


def test_a_digest_of_another_precision_is_no_other_model(put):
    document = gather(subject(), Files(evals=[put(fidelity(dtype="float32", model_sha256=OURS["float32"]))]))
    assert document["model"]["sha256"] == OURS


@pytest.mark.parametrize("document", [generated(model_sha256=None), exchange(model_sha256=None)], ids=["generate", "exchange"])
def test_a_figure_without_a_digest_is_refused(put, document):
    with pytest.raises(UsageError, match="doesn't say which model"):
        gather(subject(), Files(exchanges=[put(document)]))


def test_random_weights_are_another_model(put):
    document = exchange(model_sha256=None)
    document["configuration"]["model"] = {"size": "dit-xl-2", "tokens": 1024, "layers": 6}
    with pytest.raises(UsageError, match="random weights of size dit-xl-2"):
        gather(subject(), Files(exchanges=[put(document)]))


def test_errors_of_layers_that_are_quantized_otherwise_are_refused(put):
    other = quantized()
    other["layers"] = [one | {"weight_bits": 8} for one in other["layers"]]
    with pytest.raises(UsageError, match=r"digest [0-9a-f]{64}, those of my-w4a8 [0-9a-f]{64}"):
        gather(subject(), Files(put(other)))


def test_a_model_that_is_not_quantized_has_no_errors_of_layers(put):
    plain = subject(layers=[], recipe=None)
    document = gather(plain, Files())
    assert document["quantization"] is None and "dite bench forward my-w4a8" in document["not_measured"][2]["command"]
    with pytest.raises(UsageError, match="is not quantized"):
        gather(plain, Files(put(quantized())))


@pytest.mark.parametrize("op", ["forward", "linear"])
def test_a_bench_of_other_shapes_is_refused_with_the_shapes(put, op):
    with pytest.raises(UsageError, match=r"64×64 \(in × out features\); they are 48×192"):
        gather(subject(), Files(benches=[put(timed(op, shape=(32, 64, 64)))]))


def test_rows_of_other_shapes_are_left_out_and_counted(put):
    document = timed("linear")
    document["rows"] += timed("linear", shape=(32, 64, 64))["rows"]
    (found,) = gather(subject(), Files(benches=[put(document)]))["speed"]
    assert len(found["rows"]) == 1 and found["rows_of_other_shapes"] == 1


def test_a_forward_that_quantized_another_number_of_layers_is_refused(put):
    with pytest.raises(UsageError, match="w4a8 quantized 90 layers there, 3 of my-w4a8"):
        gather(subject(), Files(benches=[put(timed(layers=90))]))


@pytest.mark.parametrize(
    ("kind", "document", "words"),
    [
        ("exchanges", generated(exchange=None), "drawn on one device"),
        ("exchanges", timed(), "--bench"),
        ("benches", fidelity(), "--eval"),
        ("benches", {"rows": []}, "of no kind that belongs"),
    ],
)
def test_a_document_in_the_wrong_place_is_refused_with_the_right_one(put, kind, document, words):
    with pytest.raises(UsageError) as raised:
        gather(subject(), Files(**{kind: [put(document)]}))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (exchange(rows=[{"mode": "ring"}]), "rows.0.codec: Field required"),
        ({key: value for key, value in exchange().items() if key != "command"}, "lacks 'command'"),
        (timed(us={"p50": 1.0}), "rows.0.us.p20"),
        (timed(shape=(32, 48)), "shape"),
        (generated(exchange={"mode": "ring"}), "exchange.ranks"),
        (exchange(model_sha256="x"), "model_sha256"),
    ],
)
def test_a_damaged_document_is_an_error_that_names_the_file_and_the_key(put, document, why):
    with pytest.raises((CheckpointError, UsageError)) as raised:
        gather(subject(), Files(benches=[put(document)]))
    assert "one.json" in raised.value.what and why in str(raised.value)


def test_no_json_at_all_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json"):
        gather(subject(), Files(benches=[tmp_path / "x.json"]))


def test_the_page_refers_to_nothing_outside_itself_and_escapes_what_was_typed(whole):
    hostile = copy.deepcopy(whole) | {"title": "<script>alert(1)</script>"}
    hostile["fidelity"][0]["command"] = "</pre><script>"
    page = render(hostile)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(|<iframe|href=|srcset=|src=", page)
    assert "&lt;b&gt;" in page and "<b>" in page  # the reason of a layer left alone; ours


def test_a_model_that_grew_is_not_called_smaller():
    document = gather(subject(sizes={"bytes": 66_000, "baseline_bytes": 60_000}), Files())
    assert "1.10×" in render(document) and "as large as in bf16" in render(document) and "smaller than" not in render(document)


def test_the_search_of_a_plan_is_drawn(put):
    plan = {"bytes": 20_000, "error": 0.01, "uniform": [{"name": "W4 g128", "bytes": 21_000, "error": 0.02}], "frontier": [], "evaluated": []}
    recorded = [one | {"error": 0.05, "error_of": "outputs"} for one in LAYERS]
    document = gather(subject(plan=plan, layers=recorded), Files())
    assert document["quantization"]["errors_from"] == "plan.json"
    assert "--recipes w4a8 " in next(one["command"] for one in document["not_measured"] if one["section"] == "speed")
    assert "Size against error" in render(document) and "W4 g128" in render(document)


def test_the_files_are_written_and_replace_only_a_page_of_a_model(whole, tmp_path):
    paths = write_model_report(whole, tmp_path / "page")
    assert json.loads((tmp_path / "page" / "report.json").read_text(), parse_constant=pytest.fail) == json.loads(json.dumps(whole))
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["report.html", "report.json", "report.md"]
    assert write_model_report(whole, tmp_path / "page") == paths
    (tmp_path / "page" / "report.json").write_text(json.dumps(fidelity()))
    with pytest.raises(OutputExists, match="kind fidelity"):
        write_model_report(whole, tmp_path / "page")


def test_figures_that_are_no_numbers_are_drawn_as_unknown(put):
    report = fidelity()
    report["metrics"]["psnr"] = {"mean": None, "p05": None, "interval": [None, None]}
    report["metrics"]["per_step_error"] = [0.1, None]
    document = gather(subject(), Files(evals=[put(report)]))
    assert "? to ?" in render(document)


@pytest.mark.skipif(tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11), reason="pydantic before 2.11 writes the same schema in other words")
def test_the_published_schema_is_the_one_that_is_checked():
    published = Path(__file__).parents[2] / "docs" / "model-report.schema.json"
    assert json.loads(published.read_text()) == json_schema(), "python -m dite_evals.model_schema > docs/model-report.schema.json"


@pytest.mark.parametrize("values", [[("a", 0.0)], [("a", -5.0), ("b", -5.0)], [("a<b", 30.0), ("b", 0.1)]])
def test_the_plot_of_layers_takes_any_values(values):
    drawn = plots.per_layer(values, "SQNR, dB")
    assert drawn.count("<circle") == len(values) and ElementTree.fromstring(drawn) is not None
    assert all(0 <= float(y) <= plots.HEIGHT for y in re.findall(r'cy="([-\d.]+)"', drawn))
