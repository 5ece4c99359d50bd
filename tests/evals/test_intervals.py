"""Jackknife, subsampling and paired differences, on statistics whose errors are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import UsageError
from dite_evals.intervals import difference, jackknife, jackknife_of, student, subsample, wilson

ORDERS = st.integers(0, 10**6)


def normal(n, seed=0, features=1):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(x):
    return x.mean().item()


def squared_mean(x):
    """Biased: E = μ² + σ²/n."""
    return mean(x) ** 2


def test_one_group_can_not_be_left_out():
    with pytest.raises(UsageError, match="3 samples make 1 group"):
        jackknife(1.0, [1.0], 3)
    with pytest.raises(UsageError, match="at least 4"):
        jackknife_of(mean, normal(3))


@pytest.mark.parametrize("level", [0.0, 1.0, -1, 95])
def test_a_level_outside_0_and_1_is_refused(level):
    with pytest.raises(UsageError, match="between 0 and 1"):
        jackknife_of(mean, normal(9), level=level)


def test_the_jackknife_of_a_mean_is_student_s_interval():
    x = normal(20)
    found = jackknife_of(mean, x, groups=10)  # of 2 each: the mean of 10 pair means
    pairs = x.view(10, 2).mean(1)
    error = (pairs.std() / math.sqrt(10)).item()
    assert found.error == pytest.approx(error) and found.bias == pytest.approx(0, abs=1e-12)
    assert found.interval == pytest.approx((found.value - student(0.95, 9) * error, found.value + student(0.95, 9) * error))


def test_a_bias_of_one_over_n_is_removed():
    x = normal(400)
    found = jackknife_of(squared_mean, x, groups=200).corrected()
    pairs = x.view(200, 2).mean(1)
    assert found.value == pytest.approx(squared_mean(x) - pairs.var().item() / 200)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_a_corrected_estimate_has_no_bias_left_and_the_same_error():
    before = jackknife_of(squared_mean, normal(40))
    after = before.corrected()
    assert after.bias == pytest.approx(0, abs=1e-12) and after.corrected().value == pytest.approx(after.value)
    assert after.error == pytest.approx(before.error) and after.n == 40


def test_halves_of_a_mean_scatter_as_the_mean_does():
    x = normal(300)
    found = subsample(mean, x, draws=2000)
    assert found.error == pytest.approx((x.std() / math.sqrt(300)).item(), rel=0.06)
    assert subsample(squared_mean, x - x.mean(), draws=2000).bias == pytest.approx(x.var().item() / 300, rel=0.15)


@pytest.mark.parametrize(("fraction", "draws"), [(0, 100), (1, 100), (-0.5, 100), (1.5, 100), (0.05, 100), (0.5, 1), (math.nan, 9)])
def test_parts_that_can_not_be_drawn_are_refused(fraction, draws):
    with pytest.raises(UsageError, match="at least 2 draws, of 2 to 19"):
        subsample(mean, normal(20), fraction, draws)


def test_the_same_seed_draws_the_same_parts():
    x = normal(30)
    assert subsample(mean, x, seed=3) == subsample(mean, x, seed=3) != subsample(mean, x, seed=4)


def test_a_difference_of_the_same_seeds_is_narrower_than_either():
    x = normal(200)
    y = x + 0.1 + 0.01 * normal(200, seed=1)
    for method in (jackknife_of, subsample):
        first, second = method(mean, y), method(mean, x)
        found = difference(first, second)
        assert found.value == pytest.approx(mean(y) - mean(x)) and found.error < 0.05 * first.error
        assert found.interval[0] > 0 > difference(second, first).interval[1]


def test_a_model_does_not_differ_from_itself():
    one = jackknife_of(squared_mean, normal(50))
    found = difference(one, one)
    assert (found.value, found.interval) == (0, (0, 0))


def test_estimates_of_other_parts_do_not_pair_up():
    x = normal(100)
    one = jackknife_of(mean, x)
    for other in (jackknife_of(mean, x[:99]), jackknife_of(mean, x, groups=10), jackknife_of(mean, x, level=0.9), subsample(mean, x)):
        with pytest.raises(UsageError, match="pair up"):
            difference(one, other)
    with pytest.raises(UsageError, match="seed 1"):
        difference(subsample(mean, x, seed=0), subsample(mean, x, seed=1))


def test_an_interval_stays_within_its_bounds():
    found = jackknife(0.1, [0.0, 0.3, 0.0, 0.1], 8, bounds=(0.0, 0.2))
    assert found.interval == (0.0, 0.2)
    assert difference(found, found).bounds == (-math.inf, math.inf)


def test_another_level_is_the_same_error_wider():
    found = jackknife_of(mean, normal(50))
    assert found.at(0.9).level == 0.9 and found.at(0.9).at(0.95) == found
    assert found.interval[0] < found.at(0.9).interval[0] < found.value < found.at(0.9).interval[1] < found.interval[1]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(4, 80), seed=ORDERS, scale=st.floats(1e-6, 1e6), shift=st.floats(-100, 100))
def test_intervals_scale_and_shift_with_the_statistic(n, seed, scale, shift):
    x = normal(n, seed)
    plain, moved = jackknife_of(mean, x), jackknife_of(lambda part: scale * mean(part) + shift, x)
    assert moved.error == pytest.approx(scale * plain.error, rel=1e-6, abs=1e-12 * (scale + 100))
    assert moved.interval[0] <= moved.value <= moved.interval[1]


@settings(max_examples=60, deadline=None)
@given(level=st.floats(0.001, 0.999), degrees=st.integers(1, 400))
def test_student_s_quantiles_fall_with_the_degrees_and_rise_with_the_level(level, degrees):
    assert student(level, degrees) > student(level, degrees + 1) > 0
    assert student(level, degrees) < student(level + 0.0005, degrees)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_s_interval_holds_the_share_and_is_never_empty(n, share):
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1 and high - low > 0
