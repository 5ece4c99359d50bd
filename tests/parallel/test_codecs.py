"""What a packet's body can be: round trips, their errors, their sizes."""

import pytest
import torch

from dite.errors import UsageError
from dite.parallel.codecs import Reference, codec
from dite.parallel.rates import payload_bytes

LOSSY = ("int8", "int4", "int2", "int1", "lowrank-4", "topk-4")
SHAPES = [(1, 1, 1), (2, 3, 63), (1, 5, 64), (3, 7, 100), (2, 16, 130)]
RELATIVE = {"int8": 0.01, "int4": 0.12, "int2": 0.4, "int1": 0.65, "lowrank-4": 0.97, "topk-4": 0.75}  # of white noise


def noise(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sent(name, x, base, beta=None):
    used = codec(name)
    body = torch.full((used.body_bytes(tuple(x.shape), x.dtype),), 0xA5, dtype=torch.uint8)
    finite = used.encode(x, base, beta, body)
    used.decode_(base, beta, body)
    return finite, body


def error(got, x):
    return float((got.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_none_is_exact(shape, dtype):
    x, base = noise(shape, dtype=dtype), Reference(torch.zeros(shape, dtype=dtype))
    assert sent("none", x, base)[0] and torch.equal(base.value, x)


@pytest.mark.parametrize("name", LOSSY)
def test_the_error_of_white_noise_is_what_the_codec_promises(name):
    x, base = noise((2, 32, 128)), Reference(torch.zeros(2, 32, 128))
    sent(name, x, base)
    assert error(base.value, x) < RELATIVE[name]


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes_come_nearer_to_what_was_sent(name, shape):
    x, base = noise(shape), Reference(torch.zeros(shape))
    assert sent(name, x, base)[0]
    assert base.value.isfinite().all() and error(base.value, x) < 1


@pytest.mark.parametrize("name", LOSSY)
def test_a_strided_reference_is_updated_like_a_whole_one(name):
    x, wide = noise((2, 5, 70)), torch.zeros(2, 9, 140)
    whole, view = Reference(torch.zeros(2, 5, 70)), Reference(wide[:, 2:7, 70:])
    assert torch.equal(sent(name, x, whole)[1], sent(name, x, view)[1])
    assert torch.equal(view.value, whole.value) and wide[:, :, :70].abs().sum() == 0


@pytest.mark.parametrize("name", ("none", *LOSSY))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bodies_have_the_bytes_of_the_formulas(name, shape, dtype):
    assert codec(name).body_bytes(shape, dtype) == payload_bytes(name, shape[0] * shape[1], shape[2], dtype.itemsize)


@pytest.mark.parametrize("name", LOSSY)
def test_every_byte_of_a_body_is_written(name):
    x, used = noise((2, 3, 100)), codec(name)
    bodies = [torch.full((used.body_bytes((2, 3, 100), x.dtype),), fill, dtype=torch.uint8) for fill in (0, 255)]
    for body in bodies:
        used.encode(x, Reference(torch.zeros(2, 3, 100)), None, body)
    assert torch.equal(*bodies)


@pytest.mark.parametrize("name", ("none", *LOSSY))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_reported(name, bad, place):
    x = noise((2, 3, 70))
    x[place, place, place] = bad
    assert not sent(name, x, Reference(torch.zeros(2, 3, 70)))[0]


@pytest.mark.parametrize("name", LOSSY)
def test_a_zero_change_stays_zero(name):
    x = noise((1, 4, 66))
    base = Reference(x.clone(), torch.zeros_like(x))
    assert sent(name, x, base, torch.ones(1))[0]
    assert torch.equal(base.value, x)


@pytest.mark.parametrize("name", LOSSY)
def test_a_prediction_is_added_on_both_sides_alike(name):
    x, value, delta, beta = noise((2, 3, 65)), noise((2, 3, 65), 1), noise((2, 3, 65), 2), torch.tensor([0.5, 1.0])
    used, bases = codec(name), [Reference(value.clone(), delta.clone()) for _ in range(2)]
    body = torch.zeros(used.body_bytes((2, 3, 65), x.dtype), dtype=torch.uint8)
    used.encode(x, bases[0], beta, body)
    for base in bases:
        used.decode_(base, beta, body)
    assert torch.equal(bases[0].value, bases[1].value) and torch.equal(bases[0].delta, bases[1].delta)
    assert torch.allclose(bases[0].delta, bases[0].value - value, atol=1e-6)


@pytest.mark.parametrize("name", ["int3", "none-1", "lowrank", "lowrank-0", "lowrank-129", "topk-1", "topk-0", "topk-65537", "INT4", ""])
def test_unknown_names_are_refused_with_the_rule(name):
    with pytest.raises(UsageError, match=r"codecs are .*int4|takes an integer from"):
        codec(name)
