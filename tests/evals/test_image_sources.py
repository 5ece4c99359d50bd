"""Reference images from folders, parquet and `.npz`: which are taken, in what order, and what is refused."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dite.errors import CheckpointError, UnsupportedEnvironment, UsageError
from dite_evals.image_sources import MOST_PIXELS, centre_square, chosen, open_images, read_batches

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 6, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def everything(path, n=None, batch_size=4, **how) -> torch.Tensor:
    source = open_images(path, how.pop("split", None))
    return torch.cat(list(read_batches(source, chosen(source.count, n), batch_size, **how)))


def expected(*indices: int) -> torch.Tensor:
    return torch.from_numpy(PIXELS[list(indices) or slice(None)]).permute(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path):
    """Images 0 to 10 in order of their paths, in two sub-folders, among other files."""
    for index, pixels in enumerate(PIXELS):
        path = tmp_path / "set" / ("a" if index < 5 else "b") / f"{index:02}.{'png' if index % 2 else 'PNG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    (tmp_path / "set" / "labels.txt").write_text("0 0 1")
    return tmp_path / "set"


def write_parquet(path, rows, column="img", **others):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array([{"bytes": row, "path": None} for row in rows], kind), "label": list(range(len(rows))), **others})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path


@pytest.fixture
def npz(tmp_path):
    np.savez_compressed(tmp_path / "adm.npz", PIXELS, np.arange(11))
    return tmp_path / "adm.npz"


@pytest.fixture
def parquet(tmp_path):
    return write_parquet(tmp_path / "all.parquet", [png(pixels) for pixels in PIXELS])


@pytest.fixture(params=["folder", "npz", "parquet"])
def source(request):
    """The same images in each layout."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_every_layout_gives_the_same_images_in_order(source, batch_size):
    assert torch.equal(everything(source, batch_size=batch_size), expected())


def test_fewer_images_are_spread_over_the_source(source):
    assert torch.equal(everything(source, n=3), expected(0, 3, 7))
    with pytest.raises(UsageError, match="12 are wanted, the source has 11"):
        everything(source, n=12)


def test_a_name_says_what_and_not_where(folder, npz):
    assert open_images(folder).name == "set" and open_images(npz).name == "adm"


def test_splits_of_a_parquet_folder_are_never_mixed(tmp_path):
    for split, shard, rows in (("train", 0, PIXELS[:4]), ("train", 1, PIXELS[4:9]), ("test", 0, PIXELS[9:])):
        write_parquet(tmp_path / f"{split}-{shard:05}-of-00002.parquet", [png(pixels) for pixels in rows])
    assert torch.equal(everything(tmp_path, split="train"), expected(*range(9)))
    assert torch.equal(everything(tmp_path, split="train", n=2), expected(0, 4))
    assert open_images(tmp_path, "test").name == f"{tmp_path.name} test"
    with pytest.raises(UsageError, match="it has test, train"):
        open_images(tmp_path)
    with pytest.raises(UsageError, match="did you mean train"):
        open_images(tmp_path, "tarin")


def test_a_split_goes_with_parquet_only(folder):
    with pytest.raises(UsageError, match="leave --split out"):
        open_images(folder, "train")


def test_bytes_without_a_struct_are_images_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"image": [png(pixels) for pixels in PIXELS], "text": ["x"] * 11}), tmp_path / "a.parquet")
    assert torch.equal(everything(tmp_path / "a.parquet"), expected())


def test_parquet_without_one_image_column_is_refused(tmp_path):
    with pytest.raises(UsageError, match="it has img, mask among img, label, mask"):
        open_images(write_parquet(tmp_path / "a.parquet", [b"x"], mask=[b"y"]))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="it has none among label"):
        open_images(tmp_path / "b.parquet")


def test_a_row_without_bytes_names_itself(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(PIXELS[0]), None])
    with pytest.raises(CheckpointError, match=r"row 1 of .* has no image\nits bytes are empty, and paths are not followed"):
        everything(path)


def test_damaged_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(CheckpointError, match=r"a\.parquet"):
        open_images(tmp_path / "a.parquet")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UnsupportedEnvironment, match="pip install pyarrow"):
        open_images(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "reason"), [("absent", "does not exist"), ("empty", "nothing below it ends in"), ("a.tar", "neither a folder")])
def test_what_holds_no_images_is_refused(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=reason):
        open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"arr_0 float32\[2, 4, 4, 3\]"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \[N, H, W, 3\]"),
        ({"a": PIXELS, "b": PIXELS}, "it holds a uint8"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "C order"),
        ({"arr_0": PIXELS[:0]}, "holds no images"),
        ({}, "it holds nothing"),
    ],
)
def test_an_npz_of_something_else_says_what_it_holds(tmp_path, arrays, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=reason):
        open_images(tmp_path / "a.npz")


def test_images_of_another_size_are_named(folder):
    (folder / "a" / "03.png").write_bytes(png(PIXELS[0][:5]))
    with pytest.raises(UsageError, match=r"03\.png has 6×5 pixels, those before it 6×8\n--image-size 6") as error:
        everything(folder)
    assert "differ in size" in error.value.what
    assert everything(folder, image_size=4).shape == (11, 3, 4, 4)


@pytest.mark.parametrize(("shape", "size"), [((8, 6), 6), ((6, 9), 3), ((40, 70), 16), ((33, 32), 16), ((5, 5), 5), ((4, 7), 12)])
def test_the_middle_square_has_the_size_asked_for(shape, size):
    assert centre_square(Image.new("RGB", shape), size).size == (size, size)


def test_the_middle_square_is_the_middle():
    stripes = np.zeros((4, 8, 3), np.uint8)
    stripes[:, 2:6] = 200
    assert np.all(np.asarray(centre_square(Image.fromarray(stripes), 4)) == 200)
    assert np.all(np.asarray(centre_square(Image.fromarray(stripes.repeat(2, 0).repeat(2, 1)), 4)) == 200)  # halved first


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "cannot identify"),
        (png(PIXELS[0])[:60], "can't read the image"),
        (b"GIF89a" + bytes(50), "cannot identify"),
        ("I;16", "kind I;16, expected 8 bits"),
    ],
)
def test_a_damaged_or_foreign_picture_names_itself(folder, image, reason):
    if isinstance(image, str):
        Image.fromarray(np.zeros((8, 6), np.uint16)).save(folder / "a" / "02.PNG", format="PNG")
    else:
        (folder / "a" / "02.PNG").write_bytes(image)
    with pytest.raises(CheckpointError, match=reason) as error:
        everything(folder)
    assert "02.PNG" in error.value.what


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(folder):
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(folder / "a" / "01.png")
    with pytest.raises(CheckpointError, match=f"{side}×{side} pixels"):
        everything(folder)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_grey_paletted_and_transparent_pictures_become_rgb(tmp_path, mode):
    Image.fromarray(PIXELS[0]).convert(mode).save(tmp_path / "a.png")
    assert everything(tmp_path).shape == (1, 3, 8, 6)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_other_kinds_of_pictures_are_read(tmp_path, suffix):
    Image.new("RGB", (6, 8), (200, 100, 50)).save(tmp_path / f"a.{suffix}")
    assert (everything(tmp_path).float().mean((0, 2, 3)) - torch.tensor([200.0, 100, 50])).abs().max() < 4


def test_links_to_folders_are_not_followed(folder, tmp_path):
    (folder / "again").symlink_to(folder, target_is_directory=True)
    assert open_images(folder).count == 11
