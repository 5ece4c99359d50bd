"""Paired figures, against their definitions."""

import math

import pytest
import torch

from dite.errors import DiteError, UsageError
from dite.sampling import Sample
from dite_evals.fidelity import PSNR_CAP_DB, PairedFidelity, mean_interval, psnr, relative_error, ssim
from dite_evals.intervals import student


def images(n, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def one(index=0, seed=1, condition=2, latent=None, steps=2, size=16):
    latent = torch.ones(4, 2, 2) if latent is None else latent
    return Sample(index, seed, condition, images(1, size)[0], latent, [latent] * steps)


def test_psnr_is_the_textbook_formula_for_each_image():
    a, b = images(5), images(5, seed=1)
    mse = (a.double() - b.double()).square().mean((1, 2, 3))
    assert torch.allclose(psnr(a, b), 10 * torch.log10(255**2 / mse))


def test_identical_images_count_as_the_cap():
    assert psnr(images(3), images(3)).tolist() == [PSNR_CAP_DB] * 3
    assert ssim(images(3), images(3)).tolist() == pytest.approx([1.0] * 3)


def test_one_grey_level_of_error_is_48_decibels():
    a = torch.full((1, 3, 12, 12), 7, dtype=torch.uint8)
    assert psnr(a, a + 1).item() == pytest.approx(20 * math.log10(255))


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(UsageError, match="8×8"):
        ssim(images(2, 8), images(2, 8))


@pytest.mark.parametrize(
    ("value", "reference", "expected"), [([3.0, 4], [3.0, 4], 0), ([3.0, 0], [0.0, 4], 1.25), ([0.0], [0.0], 0), ([1.0], [0.0], math.inf)]
)
def test_relative_error_is_relative_to_the_reference(value, reference, expected):
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == pytest.approx(expected)


def test_metrics_have_the_keys_of_the_command_line_and_one_error_a_step():
    pairs = PairedFidelity()
    for index in range(3):
        pairs.add(one(index, latent=torch.ones(4, 2, 2) * 1.1), one(index))
    metrics = pairs.metrics()
    assert list(metrics) == ["n", "psnr", "ssim", "latent_relative_error", "per_step_error"]
    assert metrics["n"] == 3 and metrics["per_step_error"] == pytest.approx([0.1, 0.1]) and metrics["latent_relative_error"] == pytest.approx(0.1)
    assert [row["seed"] for row in pairs.rows()] == [1, 1, 1]


def test_p05_is_below_the_mean():
    pairs = PairedFidelity()
    for index in range(20):
        a, b = one(index), one(index)
        shifted = Sample(index, 1, 2, (a.image.int() + index).clamp(max=255).to(torch.uint8), a.latent, a.trajectory)
        pairs.add(shifted, b)
    psnr_found = pairs.metrics()["psnr"]
    assert psnr_found["p05"] < psnr_found["mean"] and psnr_found["interval"][0] < psnr_found["mean"] < psnr_found["interval"][1]


@pytest.mark.parametrize("other", [{"seed": 9}, {"condition": 9}])
def test_samples_of_other_seeds_or_conditions_are_no_pair(other):
    with pytest.raises(DiteError, match="pair"):
        PairedFidelity().add(one(**other), one())


@pytest.mark.parametrize("other", [{"size": 12}, {"latent": torch.ones(4, 3, 3)}, {"steps": 3}])
def test_models_of_other_shapes_or_samplers_are_refused(other):
    with pytest.raises(UsageError, match="can't be compared"):
        PairedFidelity().add(one(**other), one())


def test_nothing_to_compare_is_refused():
    with pytest.raises(UsageError):
        PairedFidelity().metrics()


def test_one_value_has_its_mean_as_interval():
    assert mean_interval(torch.tensor([4.0])) == [4.0, 4.0]


@pytest.mark.parametrize(("degrees", "table"), [(1, 12.706), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)])
def test_student_t_is_the_printed_table_s(degrees, table):
    assert student(0.95, degrees) == pytest.approx(table, rel=5e-4)
