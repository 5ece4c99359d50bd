"""The block Hadamard rotation: orthogonal for every K, the same everywhere, harmless to a linear layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dite_kernels.hadamard import blocks, matrix, rotate, signs


@given(columns=st.integers(1, 700), power=st.integers(0, 9))
def test_blocks_cover_every_column_once(columns, power):
    found = blocks(columns, 2**power)
    assert sum(width * count for width, count in found) == columns
    assert all(width <= 2**power and width & (width - 1) == 0 for width, _ in found)


@given(columns=st.integers(1, 300), power=st.integers(0, 8), seed=st.integers(0, 5))
def test_a_rotation_changes_no_product(columns, power, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for rows in (3, 5))
    sign = signs(columns, seed)
    assert torch.allclose(rotate(x, 2**power, sign) @ rotate(w, 2**power, sign).T, x @ w.T, atol=1e-9)


@pytest.mark.parametrize("width", [1, 2, 64, 256])
def test_matrices_are_orthogonal_and_symmetric(width):
    found = matrix(width, torch.float64)
    assert torch.allclose(found @ found.T, torch.eye(width, dtype=torch.float64)) and torch.equal(found, found.T)


def test_rotating_twice_gives_the_input_back():
    x = torch.randn(4, 2, 100)
    assert torch.allclose(rotate(rotate(x, 64), 64), x, atol=1e-5)


def test_an_outlier_is_spread_over_its_block_and_no_further():
    x = torch.zeros(1, 256)
    x[0, 3] = 16.0
    y = rotate(x, 128)
    assert y[0, :128].abs().max() == pytest.approx(16 / 128**0.5) and (y[0, 128:] == 0).all()


def test_signs_are_the_same_on_every_machine():
    assert signs(12, 0).tolist() == signs(40, 0)[:12].tolist()
    assert not torch.equal(signs(64, 0), signs(64, 1)) and set(signs(64, 0).tolist()) == {1.0, -1.0}


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        rotate(torch.zeros(2, 48), 48)


def test_the_dtype_stays():
    assert rotate(torch.zeros(2, 96, dtype=torch.bfloat16), 64, signs(96, 1)).dtype == torch.bfloat16
