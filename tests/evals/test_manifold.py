"""Precision and recall: by hand, by brute force, and where vectors are copies of each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import DiteError, UsageError
from dite_evals import manifold as module
from dite_evals.intervals import jackknife_of, wilson
from dite_evals.manifold import precision_recall


def normal(n, features=4, seed=0, shift=0.0):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def line(*points):
    return torch.tensor(points, dtype=torch.float64)[:, None]


def share_inside(points, centres, k):
    """The definition, without a product of matrices."""
    radii = (centres[:, None] - centres).norm(dim=2).sort(1).values[:, k]  # the first is the vector itself
    return ((points[:, None] - centres).norm(dim=2) <= radii).any(1).double().mean().item()


def test_a_line_by_hand():
    found = precision_recall(line(0.4, 3.5, -0.5, 9), line(0, 1, 2, 3), k=1)  # the reference's balls: [-1, 4]
    assert found.precision.value == 3 / 4
    assert found.recall.value == 1.0  # the samples': [-0.5, 1.3], [0.4, 6.6], [-1.4, 0.4], [3.5, 14.5]
    assert (found.k, found.reference_n, found.precision.n) == (1, 4, 4)


def test_a_tie_is_inside():
    found = precision_recall(line(4, 5, -1, -2), line(0, 1, 2, 3), k=1)
    assert found.precision.value == found.recall.value == 2 / 4  # 4 and -1 of the samples; those reach [3, 6] and [-3, 0]


@pytest.mark.parametrize(("n", "m", "k"), [(8, 5, 3), (37, 50, 3), (61, 23, 1), (45, 45, 5)])
def test_it_is_the_definition(n, m, k):
    x, y = normal(n), normal(m, seed=1, shift=0.7)
    found = precision_recall(x, y, k)
    assert (found.precision.value, found.recall.value) == pytest.approx((share_inside(x, y, k), share_inside(y, x, k)))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_jackknife_is_that_of_computing_again(k):
    x, y = normal(53), normal(40, seed=1, shift=0.7)
    found = precision_recall(x, y, k)
    for estimate, again in [
        (found.precision, jackknife_of(lambda part: share_inside(part, y, k), x)),
        (found.recall, jackknife_of(lambda part: share_inside(y, part, k), x)),
    ]:
        assert estimate.replicates.values == pytest.approx(again.replicates.values) and estimate.error == pytest.approx(again.error)


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(83), normal(57, seed=1, shift=0.5)
    whole = precision_recall(x, y)
    monkeypatch.setattr(module, "BLOCK", 300)
    assert precision_recall(x, y) == whole


def test_no_block_is_larger_than_it_may_be():
    x, y = normal(3000, 2), normal(2500, 2, seed=1)
    sizes = [block.numel() for _, block in module._distances(x, y)]
    assert max(sizes) <= module.BLOCK < sum(sizes) and sum(sizes) == 3000 * 2500


def test_a_set_has_all_of_itself():
    x = normal(40)
    found = precision_recall(x, x)
    assert found.precision.value == found.recall.value == 1
    assert found.precision.interval == wilson(1.0, 40) and found.precision.interval[0] < 0.95
    assert found.precision.at(0.9).interval == wilson(1.0, 40, 0.9)
    with pytest.raises(UsageError, match="level 2"):
        found.precision.at(2)


def test_sets_far_apart_have_nothing_of_each_other():
    found = precision_recall(normal(30), normal(30, shift=100))
    assert found.precision.value == found.recall.value == 0 and found.recall.interval[1] > 0.05


def test_a_collapsed_model_is_precise_and_recalls_nothing():
    y = normal(50) + 1000
    x = y[7].repeat(30, 1)
    found = precision_recall(x, y)
    assert found.precision.value == 1 and found.recall.value == 1 / 50


def test_copies_far_from_the_origin_are_still_copies():
    y = (normal(12) * 1e-3 + 1e4).repeat(4, 1)  # every vector four times: all balls have radius 0
    found = precision_recall(y[:12].repeat(3, 1).float(), y.float())
    assert found.precision.value == found.recall.value == 1


@pytest.mark.parametrize(("n", "m", "k"), [(3, 9, 1), (5, 9, 3), (9, 3, 3), (9, 9, 0), (9, 9, -1), (20, 20, 20)])
def test_too_few_neighbours_are_refused(n, m, k):
    with pytest.raises(UsageError, match="nearest neighbours"):
        precision_recall(normal(n), normal(m, seed=1), k)


def test_bad_features_are_refused():
    with pytest.raises(UsageError, match="3 features against 4"):
        precision_recall(normal(9, 3), normal(9))
    with pytest.raises(DiteError, match="NaN"):
        precision_recall(normal(9) * math.nan, normal(9))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(8, 60), m=st.integers(5, 60), features=st.integers(1, 6), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_it_does_not_see_order_place_or_scale(n, m, features, k, seed):
    x, y = normal(n, features, seed), normal(m, features, seed + 1, 0.5)
    found = precision_recall(x, y, k)
    turn = torch.linalg.qr(normal(features, features, seed + 2)).Q
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for a, b in [(x[order], y), (x, y.flip(0)), (x + 7, y + 7), (x * 1e3, y * 1e3), (x @ turn, y @ turn)]:
        other = precision_recall(a, b, k)
        assert (other.precision.value, other.recall.value) == (found.precision.value, found.recall.value)
    swapped = precision_recall(y, x, k) if m >= 8 else None
    assert swapped is None or (swapped.recall.value, swapped.precision.value) == (found.precision.value, found.recall.value)
    assert all(0 <= one.interval[0] <= one.value <= one.interval[1] <= 1 for one in (found.precision, found.recall))
