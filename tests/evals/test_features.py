"""Feature arrays at the edge: what is taken, and what is refused with the rule, the numbers and the fix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import DiteError, UsageError
from dite_evals.features import as_features, as_pair, check_rank, group_slices


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(4),
        torch.zeros(4, 0),
        torch.zeros(2, 3, 4),
        torch.zeros(3, 2, dtype=torch.complex64),
        np.zeros((2, 2), dtype=complex),
        [[1.0, 2.0], [3.0]],
        [["a", "b"]],
        None,
        "features",
        [],
    ],
)
def test_what_is_no_array_of_vectors_is_refused(values):
    with pytest.raises(UsageError, match="feature vectors"):
        as_features(values)


def test_too_few_vectors_are_counted():
    with pytest.raises(UsageError, match="1 given, at least 2"):
        as_features(torch.zeros(1, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_vector_that_is_not_finite_is_named(value):
    x = torch.zeros(9, 4)
    x[3, 1] = x[7, 0] = value
    with pytest.raises(DiteError, match="2 of 9 hold NaN or infinity, the first is number 3"):
        as_features(x)


def test_two_widths_are_no_pair():
    with pytest.raises(UsageError, match="5 features against 4"):
        as_pair(torch.zeros(3, 5), torch.zeros(3, 4))


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, tuple, lambda x: torch.tensor(x, dtype=torch.bfloat16), lambda x: np.array(x) > 0])
def test_every_kind_of_number_becomes_fp64(kind):
    found = as_features(kind([[0, 1], [1, 0]]))
    assert found.dtype == torch.float64 and found.tolist() == [[0, 1], [1, 0]]


def test_a_read_only_array_is_taken_and_left_alone():
    x = np.ones((3, 2))
    x.flags.writeable = False
    as_features(x).add_(1)
    assert x.sum() == 6


def test_fewer_samples_than_features_are_refused_unless_forced():
    with pytest.raises(UsageError, match=r"at most 191 of 192 dimensions(.|\n)*use 193"):
        check_rank(192, 192)
    with pytest.raises(UsageError, match="10 reference samples"):
        check_rank(10, 192, name="reference samples")
    check_rank(192, 192, force=True)
    check_rank(193, 192)


@settings(deadline=None)
@given(n=st.integers(0, 300), groups=st.integers(1, 30))
def test_groups_are_torch_s_split_into_two_or_more_each(n, groups):
    parts = group_slices(n, groups)
    assert [len(range(n)[part]) for part in parts] == [len(one) for one in torch.arange(n).tensor_split(len(parts))]
    assert parts[0].start == 0 and parts[-1].stop == n and len(parts) <= groups
    assert n < 2 or min(part.stop - part.start for part in parts) >= 2
