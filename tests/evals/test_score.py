"""Inception score: hand cases, torchmetrics, and what it must not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import DiteError, UsageError
from dite_evals.backend import torchmetrics
from dite_evals.intervals import jackknife_of
from dite_evals.score import inception_score


def normal(n, classes=10, seed=0, scale=2.0):
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sure(n, classes, logit=1e4):
    """Logits of one sure class each, in turn."""
    return logit * torch.eye(classes, dtype=torch.float64).repeat(-(-n // classes), 1)[:n]


def test_a_classifier_that_knows_nothing_scores_1():
    found = inception_score(torch.full((40, 10), 3.0), splits=4)
    assert found.value == pytest.approx(1) and found.interval == pytest.approx((1, 1))


@pytest.mark.parametrize("splits", [1, 4])
def test_sure_and_balanced_scores_the_number_of_classes(splits):
    assert inception_score(sure(40, 10), splits).value == pytest.approx(10)


def test_three_of_one_class_and_one_of_another_by_hand():
    x = sure(2, 2)[[0, 0, 0, 1]]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert inception_score(x, splits=1).value == pytest.approx(math.exp(entropy))


@pytest.mark.filterwarnings("ignore:Metric")
@pytest.mark.parametrize("splits", [2, 5, 10])
def test_torchmetrics_finds_the_same_of_the_same_shuffle(splits):
    x = normal(200)
    metric = torchmetrics("image.inception").InceptionScore(feature=torch.nn.Identity(), splits=splits)
    metric.update(x)
    torch.manual_seed(5)
    mean, std = metric.compute()
    found = inception_score(x, splits, seed=5)
    assert found.value == pytest.approx(mean.item(), rel=1e-9)
    assert found.error == pytest.approx(std.item() / math.sqrt(splits), rel=1e-9)


def test_every_sample_is_in_a_split_when_n_is_ragged():
    x = normal(25, seed=3)
    parts = x.tensor_split(10)
    assert inception_score(x).value == pytest.approx(sum(inception_score(torch.cat([p, p]), 1).value for p in parts) / 10)


def test_one_split_has_a_jackknife():
    x = normal(103)
    found, again = inception_score(x, splits=1), jackknife_of(lambda part: inception_score(part, 1).value, x)
    assert found.interval == pytest.approx(again.interval) and found.n == 103


def test_samples_sorted_by_class_need_the_shuffle():
    x = torch.eye(10, dtype=torch.float64).repeat_interleave(10, 0) * 50
    assert inception_score(x).value == pytest.approx(1) and inception_score(x, seed=0).value > 4


def test_bad_logits_are_refused():
    with pytest.raises(UsageError, match="20 are needed"):
        inception_score(normal(19))
    with pytest.raises(UsageError, match="0 splits"):
        inception_score(normal(19), splits=0)
    with pytest.raises(UsageError, match="at least 4"):
        inception_score(normal(3), splits=1)
    with pytest.raises(DiteError, match="logits are not finite"):
        inception_score(normal(40) * math.nan)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(20, 90), classes=st.integers(1, 12), splits=st.integers(1, 10), seed=st.integers(0, 999), scale=st.floats(0, 300))
def test_it_lies_between_1_and_the_number_of_classes_and_no_constant_moves_it(n, classes, splits, seed, scale):
    x = normal(n, classes, seed, scale)
    found = inception_score(x, splits)
    assert 1 - 1e-9 <= found.value <= classes + 1e-9
    assert found.interval[0] - 1e-9 <= found.value <= found.interval[1] + 1e-9
    assert inception_score(x + normal(n, 1, seed + 1), splits).value == pytest.approx(found.value)
    assert inception_score(x.flip(1), splits).value == pytest.approx(found.value)
