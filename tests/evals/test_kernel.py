"""KID and CMMD: unbiased on every small case there is, equal to torchmetrics and to plain double loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import DiteError, UsageError
from dite_evals import kernel as module
from dite_evals.backend import torchmetrics
from dite_evals.intervals import difference, jackknife_of
from dite_evals.kernel import cmmd, gaussian, kid, kid_of_subsets, mmd2, polynomial


def normal(n, features=5, seed=0, shift=0.0):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def loops(x, y, one, unbiased):
    """MMD² by the definition, one pair at a time; `one` is the kernel of two vectors."""
    across = sum(one(a, b) for a in x for b in y) / (len(x) * len(y))
    if not unbiased:
        return sum(one(a, b) for a in x for b in x) / len(x) ** 2 + sum(one(a, b) for a in y for b in y) / len(y) ** 2 - 2 * across
    within = [sum(one(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (list(x), list(y))]
    return sum(within) - 2 * across


def cube(a, b):
    return (a @ b / len(a) + 1).item() ** 3


def bell(a, b):
    return math.exp(-(a - b).square().sum().item() / (2 * 1.5**2))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 7), (9, 4)])
def test_it_is_the_mean_over_pairs(n, m, unbiased):
    x, y = normal(n), normal(m, seed=1, shift=0.5)
    assert mmd2(x, y, polynomial, unbiased) == pytest.approx(loops(x, y, cube, unbiased))
    assert mmd2(x, y, gaussian(1.5), unbiased) == pytest.approx(loops(x, y, bell, unbiased))


def test_two_samples_by_hand():
    x, y = [[0.0], [1.0]], [[2.0], [3.0]]  # k(0, 1) = 1, k(2, 3) = 7³, k(0, ·) = 1, k(1, 2) = 3³, k(1, 3) = 4³
    assert mmd2(x, y) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


def test_it_is_unbiased_over_every_draw_there_is():
    population, other = normal(4, 2), normal(3, 2, seed=1, shift=1.0)
    draws = [list(itertools.product(range(len(one)), repeat=2)) for one in (population, other)]
    found = [mmd2(population[list(a)], other[list(b)]) for a in draws[0] for b in draws[1]]
    truth = sum(polynomial(a, b).mean().item() * factor for a, b, factor in [(population, population, 1), (other, other, 1), (population, other, -2)])
    assert sum(found) / len(found) == pytest.approx(truth)


def test_with_itself_the_biased_one_is_zero_and_the_unbiased_one_below():
    x = normal(30)
    assert mmd2(x, x, unbiased=False) == pytest.approx(0, abs=1e-12)
    assert mmd2(x, x) < 0


@pytest.mark.filterwarnings("ignore:Metric")
def test_torchmetrics_subsets_are_ours():
    x, y = normal(130, 16), normal(170, 16, seed=1, shift=0.2)
    metric = torchmetrics("image.kid").KernelInceptionDistance(feature=torch.nn.Identity(), subsets=7, subset_size=60)
    metric.update(y, real=True)
    metric.update(x, real=False)
    torch.manual_seed(11)
    mean, std = metric.compute()
    found = kid_of_subsets(x, y, 60, 7, seed=11)
    assert (found.value, found.std) == pytest.approx((mean.item(), std.item()), rel=1e-9)


def test_all_samples_are_torchmetrics_s_one_subset():
    x, y = normal(90, 16), normal(90, 16, seed=1, shift=0.2)
    assert kid(x, y).value == pytest.approx(torchmetrics("image.kid").poly_mmd(y, x).item(), rel=1e-9)


def test_subsets_average_to_all_pairs():
    x, y = normal(40), normal(50, seed=1, shift=0.3)
    found, whole = kid_of_subsets(x, y, 20, 400), kid(x, y).value
    assert found.value == pytest.approx(whole, abs=4 * found.std / math.sqrt(400))


@pytest.mark.parametrize(("size", "subsets"), [(1, 5), (41, 5), (20, 0), (-3, 5)])
def test_subsets_that_can_not_be_drawn_are_refused(size, subsets):
    with pytest.raises(UsageError, match="from 40 samples and 50 reference samples"):
        kid_of_subsets(normal(40), normal(50), size, subsets)


def test_the_jackknife_by_sums_is_the_jackknife_by_computing_again():
    x, y = normal(47), normal(31, seed=1, shift=0.3)
    for found, again in [
        (kid(x, y), jackknife_of(lambda part: mmd2(part, y), x)),
        (cmmd(x, y), jackknife_of(lambda part: 1000 * mmd2(unit(part), unit(y), gaussian(10), False), x)),
        (cmmd(x, y, unbiased=True), jackknife_of(lambda part: 1000 * mmd2(unit(part), unit(y), gaussian(10)), x)),
    ]:
        assert found.value == pytest.approx(again.value, rel=1e-9) and found.interval == pytest.approx(again.interval, rel=1e-6)
        assert found.replicates.parts == again.replicates.parts


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(83), normal(57, seed=1)
    whole = kid(x, y)
    monkeypatch.setattr(module, "BLOCK", 100)
    assert kid(x, y).value == pytest.approx(whole.value, rel=1e-12) and kid(x, y).interval == pytest.approx(whole.interval, rel=1e-9)


def test_cmmd_does_not_see_how_long_an_embedding_is():
    x, y = normal(20), normal(25, seed=1, shift=1.0)
    assert cmmd(x * torch.rand(20, 1), y * 7).value == pytest.approx(cmmd(x, y).value)


def test_an_embedding_of_zeros_has_no_direction():
    x = normal(9)
    x[4] = 0
    with pytest.raises(UsageError, match="number 4"):
        cmmd(normal(9), x)


def test_bad_features_are_refused():
    with pytest.raises(UsageError, match="3 features against 5"):
        kid(normal(9, 3), normal(9, 5))
    with pytest.raises(DiteError, match="NaN"):
        kid(normal(9), normal(9) * math.nan)
    with pytest.raises(UsageError, match="at least 4"):
        kid(normal(3), normal(9))
    with pytest.raises(UsageError, match="at least 2"):
        mmd2(normal(3), normal(1))


def test_fewer_samples_than_features_are_welcome():
    x, y = normal(20, 300), normal(25, 300, seed=1)
    assert abs(kid(x, y).value) < 4 * kid(x, y).error


def test_of_two_models_the_nearer_one_wins_on_the_same_seeds():
    noise, y = normal(150), normal(150, seed=1)
    near, far = kid(noise + 0.20, y), kid(noise + 0.22, y)
    assert difference(far, near).interval[0] > 0 and difference(far, near).error < 0.3 * near.error


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 50), m=st.integers(2, 50), features=st.integers(1, 9), seed=st.integers(0, 999), shift=st.floats(-2, 2))
def test_it_is_a_distance(n, m, features, seed, shift):
    x, y = normal(n, features, seed), normal(m, features, seed + 1, shift)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    size = polynomial(x, x).mean().item() + polynomial(y, y).mean().item()
    for kernel in (polynomial, gaussian(0.7)):
        for unbiased in (True, False):
            found = mmd2(x, y, kernel, unbiased)
            assert found == pytest.approx(mmd2(y, x, kernel, unbiased), abs=1e-9 * size)
            assert found == pytest.approx(mmd2(x[order], y, kernel, unbiased), abs=1e-9 * size)
        assert mmd2(x, y, kernel, unbiased=False) >= -1e-9 * size
    found = kid(x, y)
    assert found.interval[0] <= found.value <= found.interval[1] and found.n == n
