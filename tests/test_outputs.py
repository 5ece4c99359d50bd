"""Where results may be written is asked before any work is done."""

import os

import pytest

from dite.errors import UsageError
from dite.outputs import OutputLock, check_writable


def test_a_folder_that_does_not_exist_yet_may_be_written_and_is_not_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("marker", ["dite_manifest.json", "model_index.json"])
@pytest.mark.parametrize("inside", [".", "pictures", "a/b"])
def test_a_model_is_no_place_for_other_files(tmp_path, marker, inside):
    (tmp_path / marker).write_text("{}")
    with pytest.raises(UsageError, match="unloadable"):
        check_writable(tmp_path / inside)


@pytest.mark.parametrize("inside", [".", "x", "x/y"])
def test_a_file_is_no_folder(tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a folder"):
        check_writable(tmp_path / "file" / inside)


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a place where nobody may create files; Linux has /proc")
def test_a_place_that_takes_no_files_is_refused():
    with pytest.raises(UsageError, match="can't write to /proc"):
        check_writable("/proc/nothing/here")


def test_a_lock_makes_the_folders_above_the_output(tmp_path):
    with OutputLock(tmp_path / "not" / "there" / "output") as lock:
        assert lock.held and lock.path.is_file()
    assert not lock.path.exists()
