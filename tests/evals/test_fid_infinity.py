"""FID as an estimate: its limit for N → ∞, spatial features, paired differences, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import DiteError, UsageError
from dite_evals.fid import estimate_fid, extrapolate, size_curve, torchmetrics_fid
from dite_evals.fid_infinity import estimate_fid_infinity
from dite_evals.frechet import Moments, Reference, frechet_distance, moments
from dite_evals.intervals import Estimate, difference, jackknife_of
from dite_evals.spatial import spatial_features


def normal(n, features=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, features, generator=generator, dtype=torch.float64) @ mixing + shift


def by_numpy(x, y):
    """The textbook's eigenvalues of the unsymmetric product."""
    one, other = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(one @ other).astype(complex)).real.sum()
    return float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(one) + np.trace(other) - 2 * roots


@settings(max_examples=25, deadline=None)
@given(n=st.integers(14, 90), features=st.integers(2, 12), seed=st.integers(0, 999), shift=st.floats(-3, 3))
def test_it_is_numpy_s_and_torchmetrics_s(n, features, seed, shift):
    x, y = normal(n, features, seed, shift), normal(n + 40, features, seed + 1)
    found = estimate_fid(x, moments(y)).value
    size = max(found, 1e-3 * moments(y).sigma.trace().item())
    assert found == pytest.approx(by_numpy(x, y), abs=1e-6 * size)
    assert found == pytest.approx(torchmetrics_fid(x, moments(y)), abs=1e-6 * size)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(14, 60), features=st.integers(1, 8), seed=st.integers(0, 999))
def test_it_does_not_see_order_place_or_turning(n, features, seed):
    x, y = normal(n, features, seed), normal(70, features, seed + 1, 0.3)
    turn = torch.linalg.qr(normal(features, features, seed + 2)).Q
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    found, size = estimate_fid(x, moments(y)).value, moments(y).sigma.trace().item()
    for a, b in [(x[order], y), (x + 3, y + 3), (x @ turn, y @ turn)]:
        assert estimate_fid(a, moments(b)).value == pytest.approx(found, abs=1e-7 * size)


def test_each_group_is_left_out_as_if_the_rest_were_all_there_is():
    x, reference = normal(211), Reference(moments(normal(900, seed=1, shift=0.5)))
    found = estimate_fid(x, reference)
    assert found.replicates.values == pytest.approx(jackknife_of(lambda part: reference.distance(moments(part)), x).replicates.values)


def test_correcting_takes_most_of_the_bias_away():
    reference = Reference(Moments(torch.zeros(6, dtype=torch.float64), normal(10**5).T.cov(), 10**9))
    runs = [estimate_fid(normal(60, seed=seed), reference) for seed in range(1, 41)]
    plain, corrected = (sum(one.value for one in kind) / 40 for kind in (runs, [one.corrected() for one in runs]))
    assert abs(corrected) < 0.12 * plain and all(one.interval[0] <= one.value <= one.interval[1] for one in map(Estimate.corrected, runs))


def test_fid_infinity_is_the_reported_one_with_an_interval():
    x, reference = normal(203), Reference(moments(normal(900, seed=1, shift=0.5)))
    found = estimate_fid_infinity(x, reference)
    assert found.value == pytest.approx(extrapolate(size_curve(x, reference)), rel=1e-9)
    assert found.interval[0] < found.value < found.interval[1] and found.n == 203


@pytest.mark.parametrize("n", [240, 40, 57])
def test_fid_infinity_without_a_group_is_the_line_of_the_blocks_that_are_left(n):
    x, reference = normal(n, 3), Reference(moments(normal(900, 3, seed=1, shift=0.5)))
    found, left = estimate_fid_infinity(x, reference), torch.ones(n, dtype=torch.bool)
    left[: -(-n // 20)] = False  # the first group
    points = []
    for count in range(1, 6):
        blocks = [range(index * (n // count), (index + 1) * (n // count)) for index in range(count)]
        kept = [x[[i for i in block if left[i]]] for block in blocks]
        values = [reference.distance(moments(one)) for one in kept]
        points.append((count / sum(1 / len(one) for one in kept), sum(values) / count))
    assert found.replicates.values[0] == pytest.approx(extrapolate(points), rel=1e-7)


def test_the_same_seeds_tell_two_models_apart_that_other_seeds_do_not():
    reference = Reference(moments(normal(3000, seed=1)))
    first, second, alone = (estimate_fid(normal(400, seed=seed) * scale, reference) for seed, scale in [(2, 1.30), (2, 1.31), (3, 1.31)])
    paired, unpaired = difference(second, first), difference(alone, first)
    assert paired.interval[0] > 0 and paired.error < 0.2 * unpaired.error
    assert unpaired.interval[0] < 0 < unpaired.interval[1]


def test_too_few_samples_say_how_many_are_needed():
    reference = moments(normal(90, 12))
    with pytest.raises(UsageError, match=r"at most 11 of 12(.|\n)*use 13 or more"):
        estimate_fid(normal(12, 12), reference)
    with pytest.raises(UsageError, match="at least 10"):
        estimate_fid(normal(9, 12), reference, force=True)
    with pytest.raises(UsageError, match=r"blocks have 12 samples(.|\n)*use 65 or more"):
        estimate_fid_infinity(normal(64, 12), reference)
    with pytest.raises(UsageError, match="at least 40"):
        estimate_fid_infinity(normal(39, 12), reference, force=True)
    with pytest.raises(UsageError, match="12 reference samples"):
        estimate_fid(normal(90, 12), moments(normal(12, 12)))


def test_forced_it_computes_what_it_can():
    reference = moments(normal(8, 12))
    assert estimate_fid(normal(10, 12), reference, force=True).value == pytest.approx(frechet_distance(moments(normal(10, 12)), reference))
    assert math.isfinite(estimate_fid_infinity(normal(40, 12), reference, force=True).error)


@pytest.mark.parametrize("function", [estimate_fid, estimate_fid_infinity])
def test_bad_features_are_refused(function):
    with pytest.raises(DiteError, match="NaN"):
        function(normal(90) * math.nan, moments(normal(90)))
    with pytest.raises(UsageError, match="5 features against 6"):
        function(normal(90, 5), moments(normal(90)))
    with pytest.raises(UsageError, match="feature vectors"):
        function(normal(90)[0], moments(normal(90)))


def test_spatial_features_have_the_channels_last():
    maps = torch.arange(2 * 9 * 2 * 3).reshape(2, 9, 2, 3)
    found = spatial_features(maps)
    assert found.shape == (2, 42) and found[1, :7].tolist() == maps[1, :7, 0, 0].tolist() and found[0, 7 * 4 + 2] == maps[0, 2, 1, 1]


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 7, 4), (2, 7, 0, 4)])
def test_what_is_no_map_of_enough_channels_is_refused(shape):
    with pytest.raises(UsageError, match="feature maps"):
        spatial_features(torch.zeros(shape))


def test_sfid_sees_where_things_are():
    maps = torch.rand(300, 8, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[:, :, 0, 0] += 2
    reference = moments(spatial_features(maps))
    assert estimate_fid(spatial_features(maps), reference).value < 1e-9
    assert estimate_fid(spatial_features(maps.flip(3)), reference).value > 10
