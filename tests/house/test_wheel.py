"""What a user installs. Built with hatchling itself, so that no network is needed."""

import zipfile

import pytest

import dite

MOST_BYTES = 15 * 2**20
INFO = f"dite-{dite.__version__}.dist-info"  # so that pyproject.toml and dite.__version__ must agree


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> dict[str, int]:
    """Path → size of everything in the wheel."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(root))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def _folder(root, folder: str) -> set[str]:
    paths = (path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix() for path in paths}


def test_the_wheel_holds_the_library_whole(root, wheel):
    assert _folder(root, "dite") <= wheel.keys()  # the built-in models too: they are data inside dite/models/builtin


@pytest.mark.parametrize("folder", ["kernels/dite_kernels", "evals/dite_evals"])
def test_the_packages_of_the_other_folders_lie_at_the_top(root, wheel, folder):
    assert {path.split("/", 1)[1] for path in _folder(root, folder)} <= wheel.keys()


def test_the_recipes_lie_inside_dite(root, wheel):
    assert {"dite/_" + path for path in _folder(root, "recipes")} <= wheel.keys()


def test_nothing_else_gets_in(wheel):
    assert {path.split("/")[0] for path in wheel} == {"dite", "dite_kernels", "dite_evals", INFO}
    assert [path for path in wheel if "__pycache__" in path or path.endswith(".pyc")] == []


def test_no_file_is_too_large_to_keep_in_git(wheel):
    assert {path: size for path, size in wheel.items() if size > MOST_BYTES} == {}


def test_the_wheel_brings_the_command_and_the_licence(wheel):
    assert f"{INFO}/entry_points.txt" in wheel
    assert any(path.endswith("licenses/LICENSE") for path in wheel)
