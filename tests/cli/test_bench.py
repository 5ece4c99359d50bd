"""`dite bench`: its documents, and what it refuses. Clocks are made up, so that no test waits or depends on the machine."""

import json

import pytest

from dite_evals import random_models
from dite_kernels import backends

ROW = {"op", "backend", "weight_bits", "activation_bits", "group_size", "shape", "us", "baseline", "ratio_to_baseline"}


def clock(call):
    """Every call takes a millisecond."""
    call()
    return 1e-3


@pytest.fixture(autouse=True)
def made_up_clocks(monkeypatch):
    monkeypatch.setattr("dite_kernels.bench.linear.kernel_clock", lambda device: clock)
    monkeypatch.setattr("dite_kernels.bench.linear.machine", lambda device, clock: {})
    monkeypatch.setattr("dite_kernels.bench.codec.kernel_clock", lambda device: clock)
    monkeypatch.setattr("dite_evals.speed.wall_clock", lambda device: clock)


@pytest.fixture
def linear(run):
    def call(*arguments):
        return run("bench", "linear", "--shapes", "3x32x5", "--schemes", "w8a8", "--rounds", 1, *arguments)

    return call


def test_linear_prints_one_document_with_the_fixed_keys(linear):
    document = linear("--json").document
    assert {"environment", "command", "rows", "notes"} <= document.keys()
    assert all(row.keys() >= ROW and row["shape"] == [3, 32, 5] and row["ratio_to_baseline"] == 1.0 for row in document["rows"])
    assert {row["backend"] for row in document["rows"]} >= {"expanded", "dequantize", "int_mm"}


def test_linear_says_how_to_measure_the_same_again(linear):
    command = linear("--backends", "expanded", "--json").document["command"]
    assert command == "dite bench linear --shapes 3x32x5 --schemes w8a8 --backends expanded --rounds 1 --seconds 20.0 --device cpu"


def test_without_json_people_get_a_table(linear):
    outcome = linear("--backends", "expanded")
    assert outcome.code == 0 and "3×32×5" in outcome.out and "above 1 is faster" in outcome.out


def test_a_document_is_written_where_it_is_asked_for_and_the_folder_made(linear, tmp_path):
    file = tmp_path / "new" / "linear.json"
    document = linear("--backends", "expanded", "-o", file, "--json").document
    assert json.loads(file.read_text()) == document and [path.name for path in file.parent.iterdir()] == ["linear.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "4x4"), "a shape is MxKxN"),
        (("--schemes", "w4b8"), "no scheme 'w4b8'"),
        (("--schemes", "w4a8-g20"), "no multiple of 16"),
        (("--backends", "turbo"), "no backend 'turbo'"),
        (("--rounds", "0"), "rounds"),
        (("--device", "tpu"), "unknown device"),
    ],
)
def test_linear_refuses_what_is_not_there(linear, arguments, message):
    outcome = linear(*arguments)
    assert outcome.code == 2 and message in outcome.err and outcome.out == ""


def test_an_output_that_is_a_folder_is_refused_before_anything_is_measured(linear, tmp_path):
    outcome = linear("-o", tmp_path)
    assert outcome.code == 2 and "is a folder" in outcome.err


@pytest.fixture
def codec(run):
    def call(*arguments):
        return run("bench", "codec", "--codecs", "int4", "--backends", "reference", "--elements", 1, "--rounds", 1, *arguments)

    return call


def test_codec_prints_one_document_with_the_fixed_keys(codec):
    document = codec("--json").document
    assert {"environment", "command", "rows", "notes"} <= document.keys()
    assert [(row["codec"], row["direction"], row["backend"]) for row in document["rows"]] == [
        ("int4", "encode", "reference"),
        ("int4", "decode", "reference"),
    ]
    assert all(row["elements"] == 1152 and row["ratio_to_memcpy"] == 1.0 and row["ns_per_element"]["p50"] > 0 for row in document["rows"])


def test_codec_says_how_to_measure_the_same_again_and_shows_people_a_table(codec):
    outcome = codec()
    assert outcome.code == 0 and "ns/el" in outcome.out and "above 1 is faster" in outcome.out
    again = "dite bench codec --codecs int4 --backends reference --elements 1 --rounds 1 --seconds 20.0 --device cpu"
    assert codec("--json").document["command"] == again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codecs", "int3"), "no codec 'int3'"),
        (("--backends", "turbo"), "no backend 'turbo'"),
        (("--elements", "0"), "0 elements"),
        (("--device", "tpu"), "unknown device"),
    ],
)
def test_codec_refuses_what_is_not_there(codec, arguments, message):
    outcome = codec(*arguments)
    assert outcome.code == 2 and message in outcome.err and outcome.out == ""


def test_forward_times_a_model_in_bf16_and_by_recipe(run, model_folder):
    document = run("bench", "forward", model_folder, "--recipes", "w4a8,w8a8", "--rounds", 1, "--json").document
    assert [row["name"] for row in document["rows"]] == ["torch-bf16-eager", "w4a8 on auto", "w8a8 on auto"]
    assert all(row.keys() >= ROW and row["op"] == "forward" and row["us"]["p50"] == 1000.0 for row in document["rows"])
    bf16, small, large = (row["weight_bytes"] for row in document["rows"])
    assert small < large < bf16 and document["inputs"]["hidden_states"][0] == 2 and document["notes"] == []


def test_forward_measures_each_recipe_on_each_backend(run, model_folder):
    outcome = run("bench", "forward", model_folder, "--recipes", "w8a8", "--backends", "reference,int_mm", "--rounds", 1, "--json")
    assert [row["backend"] for row in outcome.document["rows"]][1:] == ["reference", "int_mm"]
    assert all(row["output_relative_error"] < 0.1 for row in outcome.document["rows"])


def test_a_backend_that_refuses_a_layer_is_a_note(run, model_folder, monkeypatch):
    Choosy = type("Choosy", (backends.Expanded,), {"refusal": lambda self, spec, device: "not on this machine"})
    monkeypatch.setitem(backends.BACKENDS, "choosy", Choosy("choosy", "for this test"))
    document = run("bench", "forward", model_folder, "--recipes", "w8a8", "--backends", "choosy", "--rounds", 1, "--json").document
    assert len(document["rows"]) == 1 and "not on this machine" in document["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one model is needed"),
        (("m", "--size", "dit-xl-2"), "one model is needed"),
        (("m", "--tokens", "256"), "are for --size"),
        (("--size", "dit-xl-2", "--tokens", "250"), "no square picture"),
        (("--size", "dit-xl-3"), "dit-xl-3"),
        (("m", "--recipes", "w4a9"), "did you mean w4a8?"),
        (("m", "--recipes", ","), "nothing to measure"),
        (("m", "--backends", "int_mn"), "did you mean int_mm?"),
        (("m", "--peers", "torcha"), "did you mean torchao?"),
        (("no-such-folder",), "no model at"),
    ],
)
def test_forward_refuses_what_makes_no_sense(run, arguments, message):
    outcome = run("bench", "forward", *arguments)
    assert outcome.code == 2 and message in outcome.err and outcome.out == ""


def test_a_random_model_can_stand_in_for_a_folder(run, monkeypatch):
    tiny = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "num_layers": 5,
        "sample_size": 8,
        "patch_size": 2,
        "norm_num_groups": 4,
    }
    monkeypatch.setitem(random_models.SIZES, "dit-xl-2", tiny)
    arguments = ("--tokens", 9, "--layers", 2, "--recipes", "w8a8", "--batch-size", 3, "--rounds", 1)
    document = run("bench", "forward", "--size", "dit-xl-2", *arguments, "--json").document
    assert document["inputs"]["hidden_states"] == [3, 4, 6, 6] and document["rows"][0]["shape"] == [27, 48, 192]


def test_exchange_starts_its_ranks_and_tells_what_each_mode_took(run, model_folder, tmp_path):
    arguments = ("bench", "exchange", model_folder, "--modes", "ring", "--codecs", "none,int4", "--steps", 2, "--rounds", 1)
    document = run(*arguments, "--json").document
    assert [(row["mode"], row["codec"], row["ranks"], row["link"]) for row in document["rows"][:1]] == [("one_device", "none", 1, "unshaped")]
    assert {(row["mode"], row["codec"]) for row in document["rows"][1:]} == {("ring", "none"), ("ring", "int4")}
    assert {"environment", "command", "configuration", "links"} <= document.keys() and "--codecs none,int4" in document["command"]
    (tmp_path / "exchange.json").write_text(json.dumps(document))
    page = run("report", model_folder, "--exchange", tmp_path / "exchange.json", "-o", tmp_path / "page", "--json")
    assert page.code == 0, page.err
    assert page.document["exchange"][0]["model_sha256"] == page.document["model"]["sha256"]["bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one model is needed"),
        (("x", "--tokens", 16), "--tokens and --layers are for --size"),
        (("x", "--links", "10mbit"), "no link '10mbit'"),
        (("x", "--modes", "rings"), "no mode 'rings'"),
        (("x", "--codecs", "int3"), "no codec named 'int3'"),
        (("x", "--modes", "ulysses3", "--nproc", 2), "doesn't fit 2 ranks"),
    ],
)
def test_exchange_refuses_what_is_not_there(run, arguments, message):
    outcome = run("bench", "exchange", *arguments)
    assert outcome.code == 2 and message in outcome.err and outcome.out == ""


def test_exchange_shows_people_a_table(run, monkeypatch):
    row = {"mode": "ring", "codec": "int4", "link": "unshaped", "seconds_per_step": 0.5, "keyframe_seconds": 1.0, "bytes_per_step": 2_000}
    row |= {"ratio_to_one_device": 1.5, "ratio_to_best_raw_synchronous": None, "exposed_seconds": 0.1, "hidden_seconds": 0.0}
    document = {"configuration": {"links": ["unshaped"]}, "rows": [row | {"latent_relative_error": 0.01}]}
    monkeypatch.setattr("dite_evals.exchange_speed.bench_exchange", lambda asked, progress: document)
    outcome = run("bench", "exchange", "builtin:cifar10-dit")
    assert outcome.code == 0 and "500.0" in outcome.out and "1.50" in outcome.out and "times as fast as one device" in outcome.out


def test_exchange_says_that_guidance_branches_need_two_rows(run, model_folder):
    outcome = run("bench", "exchange", model_folder, "--modes", "kv_gather,cfg")
    assert outcome.code == 2 and "batch of 1" in outcome.err and "--batch-size 2" in outcome.err
