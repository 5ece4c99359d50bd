"""The bench: what it refuses, what its document holds, and what a ratio is. Times come from clocks that are made up."""

import json

import pytest
import torch

from dite_kernels import backends
from dite_kernels.bench import __main__ as command
from dite_kernels.bench import timing, vendor
from dite_kernels.bench.cases import Scheme, Shape, UnknownCase
from dite_kernels.bench.linear import Options, bench_linear
from dite_kernels.bench.timing import LEAST_ROUNDS, MOST_ROUNDS, Budget, interleave, summary

KEYS = {"op", "backend", "weight_bits", "activation_bits", "group_size", "activation_granularity", "shape", "us", "baseline", "ratio_to_baseline"}


@pytest.fixture(autouse=True)
def no_machine(monkeypatch):
    """The machine's own rates take a while, and are nobody's business here."""
    monkeypatch.setattr("dite_kernels.bench.linear.machine", lambda device, clock: {})


def clock(call):
    """Every call takes a millisecond."""
    call()
    return 1e-3


def measured(shapes="5x48x6", schemes="w4a8", names="expanded", rounds=2):
    return bench_linear(Options.parse(shapes, schemes, names, Budget(rounds)), clock)


@pytest.fixture
def broken(monkeypatch):
    """Puts a backend named `broken` with other behaviour beside the real ones."""

    def add(**methods):
        Broken = type("Broken", (backends.Expanded,), methods)
        monkeypatch.setitem(backends.BACKENDS, "broken", Broken("broken", "for this test"))

    return add


def test_a_ratio_is_the_median_of_ratios_of_the_same_rounds():
    found = summary(own=[1.0, 10.0, 2.0], baseline=[3.0, 40.0, 4.0])
    assert found.ratio == 3.0  # of 3, 4 and 2; the medians of both sides would give 4 / 2
    assert found.p50_us == 2e6 and found.us == {"p20": pytest.approx(1.4e6), "p50": 2e6, "p80": pytest.approx(6.8e6)}


def test_a_round_runs_everything_once_in_an_order_of_its_own():
    ran = []
    calls = {name: (lambda name=name: ran.append(name)) for name in "abcd"}
    interleave(calls, "a", Budget(rounds=8), clock)
    rounds = [tuple(ran[start : start + 4]) for start in range(0, len(ran), 4)]
    assert len(rounds) == 8 and all(sorted(order) == list("abcd") for order in rounds) and len(set(rounds)) > 3


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, LEAST_ROUNDS), (0.0195, 10), (1e9, MOST_ROUNDS)])
def test_seconds_are_of_measured_time_and_rounds_stay_within_bounds(seconds, rounds):
    ran = []
    interleave({"a": lambda: ran.append("a"), "b": lambda: None}, "a", Budget(seconds=seconds), clock)
    assert len(ran) == rounds


def test_a_disturbance_as_long_as_a_round_leaves_the_ratio_alone():
    slow = [1.0, 1.0, 7.0, 7.0, 7.0]
    assert summary([2 * factor for factor in slow], [3 * factor for factor in slow]).ratio == 1.5


def test_a_row_has_the_fixed_keys_and_says_what_was_run():
    document = measured(schemes="w4a8-g16-group")
    first, ceiling, row = document["rows"]
    assert all(row.keys() >= KEYS for row in document["rows"]) and document["notes"] == []
    assert (first["backend"], first["ratio_to_baseline"]) == (row["baseline"], 1.0) and ceiling["op"] == "ceiling"
    assert [row[key] for key in ("weight_bits", "activation_bits", "group_size", "activation_granularity")] == [4, 8, 16, "group"]
    assert row["shape"] == [5, 48, 6] and row["us"].keys() == {"p20", "p50", "p80"} and row["error_to_reference"] < 0.02


@pytest.mark.parametrize("shape", ["1x16x1", "3x50x7", "17x300x63"])
def test_every_backend_is_measured_on_ragged_shapes_or_has_a_note(shape):
    document = measured(shape, "w8a8,w4a8-channel", ",".join(backends.BACKENDS))
    rows = [row for row in document["rows"] if row["backend"] in backends.BACKENDS]
    assert len(rows) + len(document["notes"]) == 2 * len(backends.BACKENDS) and rows


def test_the_oracle_is_left_out_unless_it_is_asked_for():
    assert "reference" not in {row["backend"] for row in measured(names="")["rows"]}
    assert "reference" in {row["backend"] for row in measured(names="reference")["rows"]}


def test_a_refusal_becomes_a_note(broken):
    broken(refusal=lambda self, spec, device: "it has no such unit")
    document = measured(names="broken,expanded")
    assert [row["backend"] for row in document["rows"]][2:] == ["expanded"]
    assert len(document["notes"]) == 1 and "broken w4a8 at 5x48x6" in document["notes"][0] and "no such unit" in document["notes"][0]


@pytest.mark.parametrize("method", ["prepare", "linear"])
def test_a_failure_becomes_a_note_with_its_first_line(broken, method):
    def fail(self, *arguments):
        raise OSError("no compiler\nmany lines")

    broken(**{method: fail})
    assert measured(names="broken")["notes"] == ["broken w4a8 at 5x48x6: failed, OSError: no compiler"]


@pytest.mark.parametrize("wrong", [lambda y: 1.05 * y, lambda y: y * float("nan"), lambda y: y.flip(0)])
def test_a_backend_that_computes_something_else_gets_no_time(broken, wrong):
    broken(linear=lambda self, *arguments: wrong(backends.Expanded.linear(self, *arguments)))
    document = measured(names="broken")
    assert "broken" not in {row["backend"] for row in document["rows"]} and "wrong" in document["notes"][0]


def test_a_backend_that_hands_over_to_another_is_not_measured_under_its_own_name():
    assert measured(schemes="w4a16", names="int_mm")["notes"] == ["int_mm w4a16 at 5x48x6: runs as expanded"]


@pytest.mark.parametrize("text", ["256x1152", "0x16x16", "4x16x9999999", "axbxc", "4x-16x16"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(UnknownCase, match="MxKxN"):
        Shape.parse(text)


@pytest.mark.parametrize("text", ["w3a8", "w4", "w4a8-g20", "w4a8-g0", "w8a8-channel-group", "w4a16-group", "w4a8-64", "w8a8-sym-g64"])
def test_a_scheme_that_is_none_is_refused(text):
    with pytest.raises(UnknownCase, match="no scheme"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["w4a8", "w8a8-g64", "w8a8-channel", "w4a8-g64-group", "w6a16", "w8a8-channel-sym"])
def test_a_scheme_is_called_what_it_is_parsed_from(text):
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--backends", "turbo", "there are cpu, reference, int_mm"),
        ("--shapes", "4x4", "MxKxN"),
        ("--schemes", ",", "nothing"),
        ("--device", "tpu", "no device"),
    ],
)
def test_the_command_refuses_what_is_not_there(capsys, flag, value, message):
    with pytest.raises(SystemExit) as stopped:
        command.main(["linear", flag, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_command_writes_its_document_and_how_to_make_it_again(tmp_path, capsys):
    words = ["linear", "--shapes", "3x32x5", "--schemes", "w8a8", "--backends", "expanded", "--rounds", "1", "--device", "cpu"]
    assert command.main([*words, "--out", str(tmp_path / "new" / "linear.json")]) == 0
    document, printed = json.loads((tmp_path / "new" / "linear.json").read_text()), capsys.readouterr()
    assert document["command"].startswith("python -m dite_kernels.bench linear --shapes 3x32x5")
    assert {"torch", "python", "cpu", "ONEDNN_MAX_CPU_ISA", "threads", "gpu"} <= document["environment"].keys()
    assert printed.out == "" and "3×32×5" in printed.err and "expanded" in printed.err


def test_the_baseline_is_the_float_linear():
    x, weight, bias = torch.randn(9, 40).bfloat16(), torch.randn(7, 40).bfloat16(), torch.randn(7).bfloat16()
    y = vendor.baseline(vendor.Inputs(x, weight, bias)).call()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=2e-2, atol=2e-2)  # two orders of bf16 roundings


def test_the_machines_rates_count_bytes_read_and_written_and_two_operations_an_element():
    found = vendor.machine(torch.device("cpu"), lambda call: 1e-3)
    assert found == {"copy_gb_per_s": pytest.approx(2 * 2**25 / 1e6), "matmul_bf16_tflop_per_s": pytest.approx(2 * 1024**3 / 1e9)}


def test_the_wall_clock_counts_seconds(monkeypatch):
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    assert timing.wall_clock(torch.device("cpu"))(lambda: None) == 2.5
