"""The codec bench: what its document holds, what it refuses, and that nothing wrong gets a time. Clocks are made up."""

import json

import pytest
import torch

from dite_kernels import codec as exact
from dite_kernels.bench import __main__ as command
from dite_kernels.bench import cases
from dite_kernels.bench import codec as bench
from dite_kernels.bench.cases import UnknownCase
from dite_kernels.bench.codec import Options, bench_codec
from dite_kernels.bench.timing import Budget
from dite_kernels.cpu import build

KEYS = {"codec", "direction", "backend", "elements", "ns_per_element", "ratio_to_memcpy"}
ROW = bench.WIDTH


def clock(call):
    """Every call takes a millisecond, but the copy two: it is the only one that returns a tensor."""
    return 2e-3 if isinstance(call(), torch.Tensor) else 1e-3


def measured(codecs="int4", names="reference", elements=1):
    return bench_codec(Options.parse(codecs, names, elements, Budget(2)), clock)


@pytest.fixture
def other(monkeypatch):
    """Puts a backend named `other` with its own behaviour beside the real ones."""

    def add(**methods):
        Other = type("Other", (bench.Reference,), methods)
        monkeypatch.setitem(bench.CODECS, "other", lambda device: Other())

    return add


def test_every_codec_is_measured_both_ways_with_the_fixed_keys():
    document = measured(cases.DEFAULT_CODECS, elements=ROW + 1)
    assert {"environment", "rows", "notes"} <= document.keys() and document["notes"] == []
    assert [(row["codec"], row["direction"]) for row in document["rows"]] == [(kind, way) for kind in exact.BITS for way in ("encode", "decode")]
    assert all(row.keys() >= KEYS and row["elements"] == 2 * ROW for row in document["rows"])


def test_a_ratio_above_one_is_faster_than_the_copy_and_times_are_of_an_element():
    encode, decode = measured()["rows"]
    assert encode["ratio_to_memcpy"] == decode["ratio_to_memcpy"] == 2.0
    assert encode["ns_per_element"] == {name: pytest.approx(1e6 / ROW) for name in ("p20", "p50", "p80")}


def test_bandwidth_counts_what_must_be_read_and_written():
    encode, decode = measured()["rows"]
    payload = ROW // 2 + 2 * ROW // 64
    for row, size in ((encode, 6 * ROW + payload), (decode, 4 * ROW + payload)):
        assert row["gb_per_s"] == pytest.approx(size / 1e6) and row["share_of_copy_bandwidth"] == pytest.approx(2 * size / (4 * ROW))


def test_the_codecs_that_a_user_can_name_are_those_that_there_are():
    assert tuple(exact.BITS) == cases.CODECS


def test_a_backend_of_the_same_bits_has_its_rows_beside_the_reference(other):
    other()
    document = measured(names="other,reference")
    assert [(row["backend"], row["direction"]) for row in document["rows"]] == [
        (name, way) for way in ("encode", "decode") for name in ("other", "reference")
    ]


@pytest.mark.parametrize("why", [None, "no C compiler"])
def test_without_a_card_or_a_compiler_there_is_a_note_and_the_others_are_measured(monkeypatch, why):
    if why is None and isinstance(build.attempt(), str):
        pytest.skip("no kernels here")
    if why:
        monkeypatch.setattr(build, "attempt", lambda: why)
    document = measured(names="")
    assert {row["backend"] for row in document["rows"]} == ({"reference"} if why else {"reference", "cpu"})
    assert "triton: it needs an NVIDIA card" in document["notes"] and len(document["notes"]) == (2 if why else 1)


def payload_wrong(self, x, ref, kind, out):
    bench.Reference.encode_(self, x, ref, kind, out)
    out.scale[0, 0] = -out.scale[0, 0]


def reference_left_alone(self, x, ref, kind, out):
    bench.Reference.encode_(self, x, ref.clone(), kind, out)


def wrong_from_the_second_turn(self, x, ref, kind, out):
    self.first = getattr(self, "first", x)
    bench.Reference.encode_(self, self.first, ref, kind, out)


@pytest.mark.parametrize("wrong", [payload_wrong, reference_left_alone, wrong_from_the_second_turn])
def test_an_encoder_of_other_bits_gets_no_time(other, wrong):
    other(encode_=wrong)
    document = measured(names="other")
    assert [row["direction"] for row in document["rows"]] == ["decode"]
    assert len(document["notes"]) == 1 and document["notes"][0].startswith("other int4 encode: wrong")


def test_a_decoder_of_other_bits_gets_no_time(other):
    other(decode_add_=lambda self, ref, payload, kind: ref.add_(exact.decode(payload, ref.shape[-1], kind).bfloat16()))  # rounded twice
    document = measured(names="other")
    assert [row["direction"] for row in document["rows"]] == ["encode"] and document["notes"][0].startswith("other int4 decode: wrong")


def test_a_failure_becomes_a_note_with_its_first_line(other, monkeypatch):
    def fail(*arguments):
        raise OSError("no compiler\nmany lines")

    other(decode_add_=fail)
    assert measured(names="other")["notes"] == ["other int4 decode: failed, OSError: no compiler"]
    monkeypatch.setitem(bench.CODECS, "other", fail)
    assert measured(names="other,reference")["notes"] == ["other: failed, OSError: no compiler"]


@pytest.mark.parametrize("direction", bench.DIRECTIONS)
@pytest.mark.parametrize("kind", exact.BITS)
def test_a_residual_neither_fades_nor_grows_however_often_it_is_timed(kind, direction):
    signals = bench.random_signals(ROW, torch.device("cpu"))
    work = bench.DIRECTIONS[direction](bench.Reference(), signals, kind)
    for _ in range(100):
        work.call()
    residual = work.state[0].float() - signals[0].float()  # the reference is back at the second signal
    usual = signals[1].float() - signals[0].float()
    assert 0.5 < residual.norm() / usual.norm() < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3",), "no codec 'int3'; there are int8"),
        ((",",), "nothing to measure"),
        (("int4", "turbo"), "no backend 'turbo'; there are reference, cpu, triton"),
        (("int4", "", 0), "0 elements can't be measured"),
        (("int4", "", 2**40), "from 1 to"),
        (("int4", "", 1, None, "tpu"), "no device"),
    ],
)
def test_what_is_not_there_is_refused(arguments, message):
    with pytest.raises(UnknownCase, match=message):
        Options.parse(*arguments)


def test_the_command_writes_its_document_and_prints_a_table(tmp_path, capsys):
    words = ["codec", "--codecs", "int2", "--elements", "1", "--rounds", "1", "--device", "cpu"]
    assert command.main([*words, "--out", str(tmp_path / "codec.json")]) == 0
    document, printed = json.loads((tmp_path / "codec.json").read_text()), capsys.readouterr()
    assert document["command"] == "python -m dite_kernels.bench " + " ".join([*words, "--out", str(tmp_path / "codec.json")])
    assert printed.out == "" and "int2   encode" in printed.err and "above 1 is faster" in printed.err and "note: triton" in printed.err
