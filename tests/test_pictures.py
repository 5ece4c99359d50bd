"""PNG bytes and sheets of pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dite.pictures import GAP_px, difference, grid, labelled_rows, read_metadata, to_png, visible_scale


def _images(count, height=6, width=5):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_png_holds_exactly_the_pixels():
    (image,) = _images(1)
    read = np.array(Image.open(io.BytesIO(to_png(image))))
    assert torch.equal(torch.from_numpy(read).permute(2, 0, 1), image)


def test_png_bytes_are_the_same_every_time_whatever_the_order_of_the_metadata():
    (image,) = _images(1)
    assert to_png(image, {"seed": 1, "class": 2}) == to_png(image.clone(), {"class": 2, "seed": 1})
    assert b"tIME" not in to_png(image)


def test_metadata_comes_back_unicode_included():
    (image,) = _images(1)
    facts = {"prompt": "ein Schiff, 船", "seed": 2**63, "guidance": 1.5}
    assert read_metadata(to_png(image, facts)) == facts
    assert read_metadata(to_png(image)) is None


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(AssertionError, match="uint8"):
        to_png(bad)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (2, 9, 1), (6, 2, 3)])
def test_a_grid_shows_every_image_in_reading_order(count, columns, rows):
    images, used = _images(count), min(columns, count)
    sheet = grid(images, columns, scale=2)
    assert sheet.shape == (3, rows * (12 + GAP_px) - GAP_px, used * (10 + GAP_px) - GAP_px)
    top, left = (count - 1) // used * (12 + GAP_px), (count - 1) % used * (10 + GAP_px)
    assert torch.equal(sheet[:, top : top + 12 : 2, left : left + 10 : 2], images[-1])


def test_labelled_rows_keep_images_and_fit_long_labels():
    images = _images(2)
    sheet = labelled_rows({"a label much wider than two tiny images": images, "b": images}, scale=1)
    assert sheet.dtype == torch.uint8 and sheet.shape[2] > 12
    assert torch.equal(sheet[:, -6:, :5], images[0])


def test_the_difference_is_amplified_clipped_and_black_for_equals():
    a, b = torch.tensor([[10, 0, 255]], dtype=torch.uint8), torch.tensor([[13, 0, 0]], dtype=torch.uint8)
    assert difference(a, b).tolist() == [[24, 0, 255]]


@pytest.mark.parametrize(("size", "scale"), [(32, 4), (100, 2), (128, 1), (512, 1), (1, 128)])
def test_small_images_are_enlarged_until_they_can_be_seen(size, scale):
    assert visible_scale(size) == scale
