"""--fail-if: conditions are read by hand, checked early, and never executed."""

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dite.cli.gate import check_gates, parse_gates
from dite.errors import QualityGateFailed, UsageError

KEYS = ("n", "psnr.mean", "psnr.p05", "ssim", "per_step_error.N", "interval.0")


def holds(text, document):
    return parse_gates([text], KEYS)[0].holds(document)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("ssim<0.5", 0.4, True),
        ("ssim<0.5", 0.5, False),
        ("ssim<=0.5", 0.5, True),
        (" ssim >= 5e-1 ", 0.5, True),
        ("ssim>0.5", 0.5, False),
        ("ssim>-1", 0, True),
    ],
)
def test_a_gate_compares_as_written(text, value, expected):
    assert holds(text, {"ssim": value}) is expected


def test_keys_reach_into_objects_and_lists():
    assert holds("psnr.mean<30", {"psnr": {"mean": 29.9}})
    assert holds("per_step_error.1>0.5", {"per_step_error": [0.1, 0.6]})
    assert not holds("interval.0>5", {"interval": [1, 2]})


@pytest.mark.parametrize("document", [{"ssim": math.nan}, {"ssim": None}, {}, {"ssim": True}])
def test_a_figure_that_is_no_number_fails_the_gate(document):
    assert holds("ssim<0.5", document) and holds("ssim>0.5", document)


@pytest.mark.parametrize("text", ["", "ssim", "ssim<", "<0.5", "ssim==1", "ssim<nan", "ssim<inf", "ssim<x", "ssim<1 and n>2", "__import__('os')<1"])
def test_anything_but_key_operator_number_is_refused(text):
    with pytest.raises(UsageError, match="can't be read"):
        parse_gates([text], KEYS)


def test_an_unknown_key_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"did you mean psnr\.mean"):
        parse_gates(["psnr.meen<30"], KEYS)


def test_the_error_names_every_gate_that_failed():
    error = check_gates(parse_gates(["ssim<0.9", "n<5", "psnr.mean<30"], KEYS), {"ssim": 0.5, "n": 9, "psnr": {"mean": 12.3456789}})
    assert isinstance(error, QualityGateFailed) and error.exit_code == 4
    assert "ssim is 0.5" in error.why and "psnr.mean is 12.3457" in error.why and "n<5" not in error.why
    assert check_gates(parse_gates(["n<5"], KEYS), {"n": 9}) is None
    assert check_gates(parse_gates(None, KEYS), {}) is None


@given(st.text(max_size=30))
def test_no_text_does_anything_but_parse_or_refuse(text):
    with suppress(UsageError):
        parse_gates([text], KEYS)
