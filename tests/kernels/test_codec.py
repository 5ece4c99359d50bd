"""The reference residual codec: what every faster one must reproduce."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dite_kernels import codec
from dite_kernels.codec import Prediction

KINDS = list(codec.BITS)
MOST_ERROR = {"int8": 0.02, "int4": 0.2, "int2": 0.75, "int1": 1.0}  # relative, of short groups too, and of the ones with outliers
NORMAL_ERROR = {"int8": 0.006, "int4": 0.11, "int2": 0.34, "int1": 0.61}  # of many normal numbers


def sent(x, ref, kind):
    """What receivers hold afterwards."""
    after = ref.clone()
    codec.decode_add_(after, codec.encode(x, ref, kind), kind)
    return after


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 4), columns=st.integers(1, 200), seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_residual_comes_back_within_its_kind_s_error(kind, rows, columns, seed, size):
    generator = torch.Generator().manual_seed(seed)
    ref, d = (torch.randn(rows, columns, generator=generator) * size for _ in range(2))
    x = ref + d
    assert (sent(x, ref, kind) - x).norm() <= MOST_ERROR[kind] * d.norm()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(columns=st.integers(1, 200), seed=st.integers(0, 99), size=st.sampled_from([1e-8, 1e-5, 1.0, 1e3]))
def test_every_value_comes_back_within_half_a_scale(kind, columns, seed, size):
    d = torch.randn(1, columns, generator=torch.Generator().manual_seed(seed)) * size
    payload = codec.encode(d, torch.zeros_like(d), kind)
    scale = payload.scale.float().repeat_interleave(codec.GROUP, 1)[:, :columns]
    assert ((codec.decode(payload, columns, kind) - d).abs() <= scale / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_normal_residual_loses_what_the_quantizer_s_theory_says(kind):
    d = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    error = (sent(d, torch.zeros_like(d), kind) - d).norm() / d.norm()
    assert error == pytest.approx(NORMAL_ERROR[kind], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_residual_changes_nothing_and_gives_no_nan(kind):
    ref = torch.randn(3, 100)
    payload = codec.encode(ref, ref, kind)
    assert (payload.scale == 0).all() and torch.equal(sent(ref, ref, kind), ref)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_poisons_its_group_and_no_other(kind, bad):
    x, ref = torch.randn(2, 200), torch.randn(2, 200)
    x[0, 70] = bad
    finite = sent(x, ref, kind).isfinite()
    assert not finite[0, 64:128].any() and finite[0, :64].all() and finite[0, 128:].all() and finite[1].all()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_fed_back_and_do_not_accumulate(kind):
    x, ref = torch.randn(4, 128), torch.zeros(4, 128)
    errors = []
    for _ in range(40):
        x = x + torch.randn(4, 128) * 0.1
        ref = sent(x, ref, kind)
        errors.append((ref - x).norm().item())
    assert max(errors[30:]) <= 1.5 * max(errors[10:20])


@pytest.mark.parametrize("kind", KINDS)
def test_no_order_of_a_group_s_elements_changes_its_scale(kind):
    d = torch.randn(1, 64)
    shuffled = d[:, torch.randperm(64)]
    assert torch.equal(codec.encode(d, torch.zeros_like(d), kind).scale, codec.encode(shuffled, torch.zeros_like(d), kind).scale)


@pytest.mark.parametrize(("kind", "statistic"), [("int1", lambda d: d.abs().mean()), ("int2", lambda d: d.square().mean().sqrt())])
@pytest.mark.parametrize("columns", [64, 7])
def test_the_integer_sums_stand_for_the_mean_and_the_root_mean_square(kind, statistic, columns):
    d = torch.randn(1, columns)
    assert codec.encode(d, torch.zeros_like(d), kind).scale.item() == pytest.approx(statistic(d.double()).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "codes", "scale"),
    [
        ("int8", [129, 1, 255, 128], 1.0),
        ("int4", [0x18, 0x8F], 18.15625),
        ("int2", [0b10110010], 89.8125),
        ("int1", [0b11111101], 63.75),
    ],
)
def test_bytes_on_the_wire_never_change(kind, codes, scale):
    d = torch.tensor([[1.0, -127.0, 127.0, 0.0]])
    payload = codec.encode(d, torch.zeros_like(d), kind)
    assert payload.codes[0, : len(codes)].tolist() == codes and payload.scale.item() == scale


def test_leading_dimensions_are_slots_that_do_not_touch_each_other():
    x, ref = torch.randn(2, 3, 70), torch.randn(2, 3, 70)
    assert torch.equal(sent(x, ref, "int4")[1, 2], sent(x[1, 2], ref[1, 2], "int4"))


def test_encoding_leaves_its_inputs_alone():
    x, ref = torch.randn(2, 70), torch.randn(2, 70)
    before = x.clone(), ref.clone()
    codec.encode(x, ref, "int2")
    assert torch.equal(x, before[0]) and torch.equal(ref, before[1])


def test_scales_beyond_fp16_saturate_and_stay_finite():
    d = torch.full((1, 64), 1e30)
    assert codec.encode(d, torch.zeros_like(d), "int1").scale.item() == 65504


def test_unknown_kinds_and_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match="no codec named int3; use int8"):
        codec.encode(torch.zeros(2), torch.zeros(2), "int3")
    with pytest.raises(ValueError, match="they must agree"):
        codec.encode(torch.zeros(2), torch.zeros(3), "int8")


def follow(xs, kind, beta):
    """What receivers hold after each of `xs` [steps, rows, n], and the last prediction."""
    ref = xs[0].clone()
    prediction = None if beta is None else Prediction(torch.full((len(ref),), beta), torch.zeros_like(ref))
    held = [ref.clone()]
    for x in xs[1:]:
        codec.decode_add_(ref, codec.encode(x, ref, kind, prediction), kind, prediction)
        held.append(ref.clone())
    return torch.stack(held), prediction


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damping_of_zero_is_the_first_order(kind, dtype):
    xs = torch.randn(5, 3, 100).to(dtype)
    (found, prediction), (expected, _) = (follow(xs, kind, beta) for beta in (0.0, None))
    assert torch.equal(found, expected) and torch.equal(prediction.delta, (expected[-1].float() - expected[-2].float()).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_on_evenly_is_predicted(kind):
    xs = torch.randn(3, 100) + torch.arange(30.0)[:, None, None] * torch.randn(3, 100)
    first, second = ((follow(xs, kind, beta)[0][-1] - xs[-1]).norm() for beta in (None, 0.8))
    assert second < 0.5 * first


def test_a_prediction_is_of_each_leading_index_and_rounded_at_each_step():
    ref, delta = torch.full((2, 1, 1), 1.0), torch.full((2, 1, 1), 1 + 2.0**-12)
    found = Prediction(torch.tensor([1 + 2.0**-12, 0.5]), delta).of(ref)
    assert found.flatten().tolist() == [torch.tensor(2 + 2.0**-11).item(), 1.5 + 2.0**-13]


def test_predictions_of_other_shapes_are_refused():
    ref = torch.zeros(2, 3, 4)
    for beta, delta, why in ((torch.ones(3), ref, "beta"), (torch.ones(2).double(), ref, "beta"), (torch.ones(2), ref[0], "delta")):
        with pytest.raises(ValueError, match=why):
            codec.encode(ref, ref, "int8", Prediction(beta, delta))
