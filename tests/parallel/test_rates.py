"""Codecs have one name each, payloads have the bytes of the reference, and errors are measured in the closed loop."""

import math

import numpy as np
import pytest

from dite.errors import UsageError
from dite.parallel.rates import BITS, closed_loop_error, parse_codec, payload_bytes

NO_CODECS = ["int3", "INT4", "lowrank", "lowrank-", "lowrank-0", "lowrank-08", "lowrank-+8", "lowrank-٣", "topk-1", "topk-99999", 4, None, ["int4"]]


@pytest.mark.parametrize("name", NO_CODECS)
def test_what_is_no_codec_is_refused(name):
    with pytest.raises(UsageError):
        parse_codec(name)


def test_a_misspelt_codec_is_told_the_nearest():
    with pytest.raises(UsageError, match="did you mean int4"):
        parse_codec("int44")


def test_numbered_codecs_carry_their_number():
    assert [parse_codec(name) for name in ("none", "lowrank-8", "topk-32")] == [("none", 0), ("lowrank", 8), ("topk", 32)]


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "int1"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (5, 65), (4, 1152)])
def test_payloads_have_the_bytes_of_the_reference_codec(kind, shape):
    # As payload_shapes of the kernels' reference: codes of whole groups of 64, and one fp16 scale a group.
    groups = math.ceil(shape[1] / 64)
    assert payload_bytes(kind, *shape) == shape[0] * (groups * 64 * BITS[kind] // 8 + 2 * groups)


def test_raw_low_rank_and_topk_bytes():
    assert payload_bytes("none", 3, 5, value_bytes=4) == 60
    assert payload_bytes("lowrank-2", 100, 50) == 2 * 2 * 150
    assert payload_bytes("lowrank-128", 100, 50) == 2 * 50 * 150  # no more factors than the smaller side
    assert payload_bytes("topk-32", 2, 65) == 2 * 2 * 4 and payload_bytes("topk-512", 2, 100) == 2 * 1 * 4


def one_bit(d):
    return np.sign(d) * abs(d).mean()


def walk(steps=40, size=256):
    return np.cumsum(np.random.default_rng(0).normal(size=(steps, size)), axis=0)


def test_an_exact_codec_has_no_error_and_a_silent_one_grows():
    assert closed_loop_error(walk(), lambda d: d) == pytest.approx(0.0, abs=1e-20)
    assert closed_loop_error(walk(), lambda d: 0 * d) > 10  # never updated: further off with every step


def test_feedback_keeps_the_error_of_a_coarse_codec_bounded():
    errors = [closed_loop_error(walk(steps), one_bit) for steps in (20, 200)]
    assert 0.3 < errors[1] < 1.3 * errors[0]


def test_momentum_helps_where_changes_are_alike():
    drifts = [np.random.default_rng(1).normal(size=256)]
    for noise in np.random.default_rng(2).normal(size=(40, 256)):
        drifts.append(0.9 * drifts[-1] + 0.43 * noise)
    plain, momentum = (closed_loop_error(np.cumsum(drifts, axis=0), one_bit, momentum) for momentum in (0.0, 0.5))
    assert momentum < 0.8 * plain


def test_nothing_to_measure_is_an_error():
    with pytest.raises(UsageError):
        closed_loop_error([np.ones(3)] * 4, lambda d: d)
    with pytest.raises(UsageError):
        closed_loop_error([], lambda d: d)
