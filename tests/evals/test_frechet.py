"""The Fréchet distance, its interval and its limit, against slower and independent computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import DiteError, UsageError
from dite_evals.fid import agree_with_torchmetrics, estimate_fid, extrapolate, fid_between, size_curve, torchmetrics_fid
from dite_evals.frechet import Moments, Reference, frechet_distance, moments


def gaussian(n, features=6, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, features, generator=generator) @ mixing * scale + shift


def slow_frechet(a: Moments, b: Moments) -> float:
    """The textbook formula: a Denman-Beavers matrix square root of the unsymmetric product."""
    y, z = a.sigma @ b.sigma, torch.eye(len(a.mu), dtype=torch.float64)
    for _ in range(60):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return ((a.mu - b.mu).square().sum() + torch.trace(a.sigma + b.sigma - 2 * y)).item()


def test_it_equals_the_textbook_formula():
    a, b = moments(gaussian(63)), moments(gaussian(500, seed=1, shift=0.5, scale=1.3))
    assert frechet_distance(a, b) == pytest.approx(slow_frechet(a, b), rel=1e-9)


def test_it_equals_torchmetrics_even_when_the_covariance_is_singular():
    reference = moments(gaussian(400, features=24))
    few = gaussian(9, features=24, seed=3, shift=0.2)
    assert frechet_distance(moments(few), reference) == pytest.approx(torchmetrics_fid(few, reference), rel=1e-5)


def test_one_feature_has_a_closed_form():
    a, b = moments(torch.tensor([[0.0], [2.0]])), moments(torch.tensor([[1.0], [7.0]]))
    assert frechet_distance(a, b) == pytest.approx((1 - 4) ** 2 + (math.sqrt(2) - math.sqrt(18)) ** 2)


def test_the_moments_are_numpy_s():
    x = gaussian(37)
    found = moments(x)
    assert torch.allclose(found.sigma, torch.cov(x.double().T)) and torch.allclose(found.mu, x.double().mean(0))


def test_one_sample_has_no_covariance():
    with pytest.raises(UsageError, match="at least 2"):
        moments(torch.zeros(1, 4))


def test_features_of_other_widths_are_refused():
    with pytest.raises(UsageError, match="5 features against 4"):
        Reference(moments(gaussian(9, 4))).distance(moments(gaussian(9, 5)))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), features=st.integers(1, 12), seed=st.integers(0, 999), scale=st.floats(0.01, 100))
def test_it_is_a_distance(n, features, seed, scale):
    a, b = moments(gaussian(n, features, seed, scale=scale)), moments(gaussian(n + 3, features, seed + 1, shift=scale))
    size = (a.sigma.trace() + b.sigma.trace()).item() + scale
    assert frechet_distance(a, a) <= 1e-6 * size
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-6 * size)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(10, 90), seed=st.integers(0, 999))
def test_the_interval_contains_the_estimate(n, seed):
    reference, features = Reference(moments(gaussian(200))), gaussian(n, seed=seed)
    found = estimate_fid(features, reference)
    low, high = found.interval
    assert found.value == reference.distance(moments(features)) and 0 <= low <= found.value <= high < math.inf


def test_the_interval_is_as_wide_as_independent_runs_scatter():
    reference = Reference(moments(gaussian(5000)))
    runs = [gaussian(400, seed=seed, shift=0.3) for seed in range(1, 41)]
    values = torch.tensor([reference.distance(moments(x)) for x in runs])
    intervals = [estimate_fid(x, reference).interval for x in runs]
    widths = torch.tensor([(high - low) / 2 / 2.09 for low, high in intervals])
    assert 0.7 < widths.mean() / values.std() < 1.4


def test_the_limit_takes_most_of_the_bias_away():
    reference = Reference(moments(gaussian(20000)))
    features = gaussian(300, seed=2)
    curve = size_curve(features, reference)
    assert [size for size, _ in curve] == [300, 150, 100, 75, 60]
    assert abs(extrapolate(curve)) < 0.35 * curve[0][1]


def test_a_line_against_one_over_n_is_extrapolated_exactly():
    assert extrapolate([(n, 3.0 + 50 / n) for n in (100, 50, 33, 25, 20)]) == pytest.approx(3.0)


def test_ten_samples_are_enough_if_forced_and_nine_are_not():
    reference = moments(gaussian(50, 192))
    found = estimate_fid(gaussian(10, 192, seed=4), reference, force=True)
    assert found.n == 10 and found.interval[0] <= found.value <= found.interval[1]
    with pytest.raises(UsageError, match="at least 10"):
        estimate_fid(gaussian(9, 192), reference, force=True)


def test_another_fid_than_torchmetrics_is_an_error():
    features, reference = gaussian(60, seed=3), moments(gaussian(50))
    value = estimate_fid(features, reference).value
    agree_with_torchmetrics(value, features, reference)
    with pytest.raises(DiteError, match="disagree"):
        agree_with_torchmetrics(1.01 * value + 1, features, reference)


def test_images_are_at_no_distance_from_themselves_and_at_some_from_others(extractor):
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert fid_between(extractor, images, images) < 1e-6
    assert fid_between(extractor, images, images // 2) > 1e-3
