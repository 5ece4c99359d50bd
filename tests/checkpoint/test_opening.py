"""Opening a file of a folder that nobody vouches for: it never waits, and follows no link out of the folder."""

import os
import socket
import sys

import pytest

from dite.checkpoint.header import read_header
from dite.checkpoint.strict_json import parse_strict, read_strict
from dite.errors import CheckpointError
from tests.checkpoint.hostile.watch import deadline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="makes pipes and sockets")


def listen(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def link(path):
    (path.parent / "target").write_text("{}")
    path.symlink_to("target")


SORTS = {
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (os.mkdir, "not a regular file"),
    "socket": (listen, "not a regular file"),
    "link": (link, "is a link"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a link"),
    "nothing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("read", [read_strict, read_header])
@pytest.mark.parametrize("sort", SORTS)
def test_what_is_no_regular_file_is_refused_by_name_and_at_once(sort, read, tmp_path):
    make, why = SORTS[sort]
    make(tmp_path / "x.json")
    with deadline(10), pytest.raises(CheckpointError, match=rf"(?s){tmp_path.name}/x.json .*{why}"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize(("blob", "taken"), [("0" * 40, True), ("0" * 64, True), ("secret", False), ("../" + "0" * 40, False)])
@pytest.mark.parametrize("inside", ["config.json", "transformer/config.json"])
def test_a_link_is_followed_from_a_snapshot_of_the_hub_s_cache_to_its_blobs_only(blob, taken, inside, tmp_path):
    path = tmp_path / "models--a--b" / "snapshots" / "0123" / inside
    path.parent.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    target = tmp_path / "models--a--b" / "blobs" / blob
    target.write_text('{"a": 1}')
    path.symlink_to(target)
    if taken:
        assert read_strict(path) == {"a": 1}
    else:
        with pytest.raises(CheckpointError, match="is a link"):
            read_strict(path)


@pytest.mark.parametrize("depth", [63, 64, 65, 200])
def test_nesting_is_limited_to_64_levels(depth):
    data = b'{"a":' * depth + b"1" + b"}" * depth
    if depth <= 64:
        assert parse_strict(data)
    else:
        with pytest.raises(ValueError, match="nested deeper than 64"):
            parse_strict(data)


@pytest.mark.parametrize(("data", "taken"), [(b'{"lambda_min_clipped": -Infinity}', True), (b'{"a": {"b": [-Infinity]}}', False)])
def test_minus_infinity_is_a_number_where_diffusers_writes_it_and_nowhere_else(data, taken):
    if taken:
        assert parse_strict(data)
    else:
        with pytest.raises(ValueError, match=r"a\.b\.0 is -Infinity"):
            parse_strict(data)
