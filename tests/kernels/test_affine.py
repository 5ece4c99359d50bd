import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite_kernels.affine import dequantize, quantize

BITS = st.sampled_from([4, 6, 8])
GROUPS = st.sampled_from([16, 32, 48, 128, None])
ROWS, COLUMNS = st.integers(1, 5), st.integers(1, 150)


def restored(x, bits, group_size, symmetric, half_scales=False):
    codes, scale, zero = quantize(x, bits, group_size, symmetric, half_scales)
    return dequantize(codes, scale, zero, group_size), scale.float().repeat_interleave(group_size or x.shape[1], 1)[:, : x.shape[1]]


@settings(deadline=None, max_examples=60)
@given(BITS, GROUPS, st.booleans(), st.booleans(), ROWS, COLUMNS, st.integers(0, 99), st.sampled_from([1e-6, 1.0, 1e4]))
def test_every_value_comes_back_within_half_a_scale(bits, group_size, symmetric, half_scales, rows, columns, seed, size):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    back, scale = restored(x, bits, group_size, symmetric, half_scales)
    assert ((x - back).abs() <= scale / 2 * (1 + 1e-5)).all()


@settings(deadline=None, max_examples=40)
@given(BITS, GROUPS, st.booleans(), COLUMNS, st.sampled_from(["positive", "negative", "constant", "zeros"]))
def test_zero_comes_back_as_exactly_zero_from_one_sided_and_constant_groups(bits, group_size, symmetric, columns, kind):
    x = {"positive": torch.linspace(10, 11, columns), "negative": -torch.linspace(10, 11, columns)}.get(kind, torch.zeros(columns))[None].clone()
    x = torch.full_like(x, 3.0) if kind == "constant" else x
    x[:, ::3] = 0
    back, _ = restored(x, bits, group_size, symmetric)
    assert (back[:, ::3] == 0).all()


def test_a_group_far_from_zero_keeps_its_shape():
    """Ranges that don't include zero turn [10, 11] into a constant."""
    x = torch.linspace(10, 11, 32)[None]
    back, _ = restored(x, 8, 32, False)
    assert back.unique().numel() > 16


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_zero_groups_get_scale_one_and_no_nan(symmetric):
    codes, scale, zero = quantize(torch.zeros(2, 40), 4, 16, symmetric)
    assert (scale == 1).all() and (dequantize(codes, scale, zero, 16) == 0).all()


@settings(deadline=None, max_examples=30)
@given(BITS, GROUPS, st.booleans(), COLUMNS, st.integers(0, 99))
def test_quantizing_twice_changes_nothing(bits, group_size, symmetric, columns, seed):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    once, _ = restored(x, bits, group_size, symmetric)
    twice, _ = restored(once, bits, group_size, symmetric)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(BITS, GROUPS, st.booleans(), COLUMNS, st.sampled_from([0.125, 2.0, 64.0]))
def test_scaling_the_input_scales_the_scale_and_keeps_the_codes(bits, group_size, symmetric, columns, factor):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    a, b = quantize(x, bits, group_size, symmetric), quantize(x * factor, bits, group_size, symmetric)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale * factor, b.scale)


def test_a_row_does_not_depend_on_the_other_rows():
    x = torch.randn(9, 50)
    whole, alone = quantize(x, 8, 16, False), quantize(x[4:5], 8, 16, False)
    assert all(torch.equal(a[4:5], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_poisons_only_its_own_group(bad):
    x = torch.randn(2, 64)
    x[0, 20] = bad
    codes, scale, zero = quantize(x, 8, 16, False)
    finite = dequantize(codes, scale, zero, 16).isfinite()
    assert not finite[0, 16:32].any() and finite[0, :16].all() and finite[0, 32:].all() and finite[1].all()


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 255.0]])
    assert quantize(x, 8, None, False).codes.tolist() == [[0, 0, 2, 2, 255]]


def test_scales_too_small_for_fp16_stay_fp32():
    assert quantize(torch.randn(2, 16) * 1e-7, 8, None, False, half_scales=True).scale.dtype == torch.float32
    assert quantize(torch.randn(2, 16), 8, None, False, half_scales=True).scale.dtype == torch.float16


def test_no_rows_are_fine():
    assert quantize(torch.zeros(0, 7), 4, 16, False).codes.shape == (0, 7)
