"""Resizing, against Pillow itself, against exact fractions, and against cases small enough for a person to work out."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from dite_evals.resize import bicubic_weights, clean, legacy, resize

SHAPES = [(32, 32, 299), (256, 256, 299), (40, 37, 17), (512, 300, 299), (299, 100, 299), (299, 299, 299), (7, 3, 2), (1, 1, 5)]
ULP_256 = 2**-15  # of single precision between 256 and 512, where an overshoot can lie


def noise(height: int, width: int, count: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height * width))


def with_pillow(images: torch.Tensor, size: int) -> torch.Tensor:
    """clean-fid's way: each channel by itself as a float image, bicubic."""

    def channel(x: torch.Tensor) -> np.ndarray:
        return np.asarray(Image.fromarray(x.numpy().astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))

    return torch.from_numpy(np.stack([[channel(x) for x in image] for image in images]))


def exactly(row: list[int], size: int) -> list[Fraction]:
    """TF1's rule for one row, in fractions: output i lies at i · old / new, between its left neighbour and the next."""
    found = []
    for index in range(size):
        position = Fraction(index * len(row), size)
        left = position.numerator // position.denominator
        right = min(left + 1, len(row) - 1)
        found.append(row[left] + (row[right] - row[left]) * (position - left))
    return found


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_clean_is_pillow_s_bicubic_to_the_last_bit_or_the_one_before(height, width, size):
    images = noise(height, width, 2)
    assert (clean(images, size) - with_pillow(images, size)).abs().max() <= ULP_256  # its release decides which pass comes first


def test_clean_neither_rounds_nor_clips():
    edge = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).expand(1, 3, 4, 4)
    found = clean(edge, 12)
    assert found.min() < 0 and found.max() > 255 and found.frac().abs().max() > 0


def test_a_shrunk_checkerboard_is_grey_when_clean_and_black_when_legacy():
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64)
    assert (clean(board, 16)[..., 2:-2, 2:-2] - 127.5).abs().max() < 1
    assert legacy(board, 16).max() == 0


@pytest.mark.parametrize(("old", "new"), [(5, 9), (9, 5), (1, 3), (3, 1), (256, 299), (299, 32)])
def test_bicubic_weights_of_a_pixel_add_up_to_one(old, new):
    assert bicubic_weights(old, new).shape == (new, old)
    assert torch.allclose(bicubic_weights(old, new).sum(1), torch.ones(new, dtype=torch.float64))


@pytest.mark.parametrize(
    ("row", "size", "expected"),
    [
        ([0, 100], 4, [0, 50, 100, 100]),  # positions 0, ½, 1, 1½: right of the last pixel there is only itself
        ([10, 20, 40], 2, [10, 30]),  # 0 and 1½
        ([0, 90, 180], 3, [0, 90, 180]),
        ([0, 30, 60, 90, 120, 150], 2, [0, 90]),  # 0 and 3: what lies between is skipped
        ([7], 3, [7, 7, 7]),
        ([0, 60], 6, [0, 20, 40, 60, 60, 60]),
    ],
)
def test_legacy_by_hand_along_either_side(row, size, expected):
    across = torch.tensor(row, dtype=torch.uint8).expand(1, 3, len(row), len(row))
    for found in (legacy(across, size)[0, 0], legacy(across.mT, size)[0, 0].T):
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32).expand(size, size), atol=1e-4)


def test_legacy_blends_both_sides_by_hand():
    square = torch.tensor([[0, 100], [200, 40]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert legacy(square, 4)[0, 0].tolist() == [[0, 50, 100, 100], [100, 85, 70, 70], [200, 120, 40, 40], [200, 120, 40, 40]]


@pytest.mark.parametrize("old", [2, 31, 32, 256, 300, 1024])
def test_legacy_is_the_exact_rule_up_to_single_precision(old):
    row = noise(1, old)[0, 0, 0].tolist()
    found = legacy(torch.tensor(row, dtype=torch.uint8).expand(1, 3, 4, old), 299)[0, 0, 0].double()
    exact = torch.tensor([float(value) for value in exactly(row, 299)], dtype=torch.float64)
    assert (found - exact).abs().max() <= 255 * old * 2**-23  # a position of `old` pixels has so fine a last bit


def test_legacy_is_not_what_torch_does():
    images = noise(32, 32)
    halves = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    assert (legacy(images, 299) - halves).abs().max() > 10


@pytest.mark.parametrize("how", ["clean", "legacy", "none"])
def test_images_that_have_the_size_stay_as_they_are(how):
    assert torch.equal(resize(noise(24, 24), 24, how), noise(24, 24).float())


def test_an_image_does_not_depend_on_its_batch():
    images = noise(50, 41, 5)
    for how in ("clean", "legacy"):
        assert torch.equal(resize(images, 29, how)[2:3], resize(images[2:3], 29, how))
