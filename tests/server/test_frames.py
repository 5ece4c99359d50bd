"""Messages come through a pipe whole, or not at all."""

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dite.server.frames import HEADER, MAGIC, BadFrame, Channel, pack, parse, read, sizes

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def read_all(data):
    async def story():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read(reader)

    return asyncio.run(story())


@given(json_values, st.binary(max_size=200))
def test_what_is_packed_is_read(value, raw):
    message = {"type": "x", "value": value}
    assert read_all(pack(message, raw)) == (message, raw)


@given(st.integers(0, 40))
def test_a_message_that_breaks_off_is_the_end(count):
    assert read_all(pack({"type": "x"}, b"12345678901234567890")[:count]) is None


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"type": 1}', b'{"type": "x", "y": NaN}', b"\xff", b"[" * 100000])
def test_what_is_no_message_is_refused(text):
    with pytest.raises(BadFrame):
        parse(text)


@pytest.mark.parametrize("header", [HEADER.pack(b"ditE", 2, 0), HEADER.pack(MAGIC, 2**31, 0), HEADER.pack(MAGIC, 2, 2**40)])
def test_a_header_that_promises_too_much_is_refused(header):
    with pytest.raises(BadFrame):
        sizes(header)


def test_a_channel_gives_what_is_there_and_says_when_the_other_end_is_closed():
    ours, theirs = socket.socketpair()
    near, far = Channel(ours), Channel(theirs)
    assert far.receive(wait=False) is None
    near.send({"type": "a"}, b"raw")
    near.send({"type": "b"})
    assert far.receive(wait=True) == ({"type": "a"}, b"raw") and far.receive(wait=False) == ({"type": "b"}, b"")
    ours.close()
    with pytest.raises(EOFError):
        far.receive(wait=True)
    theirs.close()
