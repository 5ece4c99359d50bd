"""`.npz` files from anywhere: read only as far as they keep their word, and never through pickle."""

import io
import zipfile

import numpy as np
import pytest

from dite.errors import CheckpointError
from dite_evals import npz


def member(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def write(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save):
    arrays = {"mu": np.arange(5.0), "square": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "empty": np.zeros((0, 4), np.uint8)}
    save(tmp_path / "a.npz", **arrays)
    assert {name: header.shape for name, header in npz.read_headers(tmp_path / "a.npz").items()} == {"mu": (5,), "square": (2, 3), "empty": (0, 4)}
    assert all(np.array_equal(npz.read_array(tmp_path / "a.npz", name), array) for name, array in arrays.items())


def test_what_we_write_numpy_reads(tmp_path):
    npz.write_npz(tmp_path / "a.npz", {"mu": np.arange(3.0)})
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert np.array_equal(np.lib.format.read_array(archive.open("mu.npy")), [0, 1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("wanted", [[0, 1, 2, 3, 4], [1], [0, 4], [], [2, 3]])
def test_rows_are_read_in_one_pass(tmp_path, wanted):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", array)
    rows = list(npz.read_rows(tmp_path / "a.npz", "arr_0", wanted))
    assert len(rows) == len(wanted) and all(np.array_equal(row, array[index]) for row, index in zip(rows, wanted, strict=True))


def test_objects_are_refused_before_anything_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = write(tmp_path / "a.npz", mu=member(np.array([Trap()], dtype=object)))
    for read in (lambda: npz.read_headers(path), lambda: npz.read_array(path, "mu"), lambda: list(npz.read_rows(path, "mu", [0]))):
        with pytest.raises(CheckpointError):
            read()
    assert not (tmp_path / "ran").exists()


def header(shape: str, dtype: str = "'<f8'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header("(1000000000000,)"), "and has 0"),
        (header("(2,)") + bytes(8), "16 bytes, and has 8"),
        (header("(2,)") + bytes(99), "and has 99"),
        (header("(-2,)") + bytes(16), "-16 bytes"),
        (header("(__import__('os').abort(),)"), "can't read"),
        (header("(2,)", "'no such type'"), "can't read"),
        (member(np.zeros(2))[:9], "can't read"),
        (b"not an array", "can't read"),
        (b"\x93NUMPY\x03\x00" + bytes(200), r"format \(3, 0\)"),
    ],
)
def test_a_member_that_does_not_keep_its_word_is_refused(tmp_path, content, reason):
    with pytest.raises(CheckpointError, match=reason):
        npz.read_headers(write(tmp_path / "a.npz", mu=content))


def test_an_array_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "bomb.npz", mu=member(np.zeros(2**20)))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="8388608 bytes, 1000 are the most"):
        npz.read_array(path, "mu", most_bytes=1000)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", bytes(100)])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.npz"):
        npz.read_headers(tmp_path / "a.npz")


def test_a_damaged_or_missing_member_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, mu=np.random.default_rng(0).random(500))
    with pytest.raises(CheckpointError, match="sigma"):
        npz.read_array(path, "sigma")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        npz.read_array(path, "mu")
