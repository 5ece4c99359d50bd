"""Clients that are slow, hostile or gone, on real sockets."""

import asyncio
import contextlib
import select
import socket
import threading
import time

import pytest
from fakes import FakeService, answer_on, counted, ended, is_problem, request_bytes, serving, until

from dite.server import guard
from dite.server.listen import _answered
from dite.server.logs import adopt

QUICK = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "send_timeout_s": 0.3, "connections": 8}
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    adopt("uvicorn.error")


@pytest.fixture(scope="module")
def quick():
    """A server with short deadlines."""
    with serving(FakeService(limits=QUICK)) as served:
        yield served


@pytest.fixture(autouse=True)
def _nobody_left(request):
    """Every test begins without connections of the one before."""
    yield
    if "quick" in request.fixturenames:
        until(lambda: request.getfixturevalue("quick").connections == 0)


def dribble(wire, text, pause_s=0.05):
    """Send byte by byte until the server says something."""
    with contextlib.suppress(ConnectionError):
        for byte in text:
            if select.select([wire], [], [], pause_s)[0]:
                return
            wire.sendall(bytes([byte]))


def test_a_connection_that_says_nothing_is_closed(quick):
    with quick.dial() as wire:
        began = time.monotonic()
        assert ended(wire) and 0.2 < time.monotonic() - began < 3


def test_headers_that_never_end_are_refused(quick):
    with quick.dial() as wire:
        began = time.monotonic()
        dribble(wire, b"GET /health HTTP/1.1\r\nhost: " + b"x" * 60)
        status, headers, body = answer_on(wire)
        assert (status, headers["connection"], is_problem(body)) == (408, "close", True)
        assert ended(wire) and time.monotonic() - began < 3


def test_headers_that_never_end_are_refused_on_a_kept_alive_connection_too(quick):
    with quick.dial(GET) as wire:
        assert answer_on(wire)[0] == 200
        time.sleep(0.4)  # idle for longer than headers may take
        dribble(wire, b"GET /health")
        assert answer_on(wire)[0] == 408 and ended(wire)


def test_headers_that_began_during_the_answer_before_must_end_too(quick):
    with quick.dial(GET + b"GET /hea") as wire:
        assert [answer_on(wire)[0], answer_on(wire)[0]] == [200, 408]


@pytest.mark.parametrize("size", [21_000, 200_000])
def test_headers_that_are_too_large_are_refused(quick, size):
    with quick.dial() as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * size + b"\r\n\r\n")
        status, _, body = answer_on(wire)
        assert (status, body["error"]["code"]) == (431, "headers_too_large") and "16384" in body["error"]["message"]


def test_large_headers_are_fine_below_the_limit(quick):
    with quick.dial(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 12_000 + b"\r\n\r\n") as wire:
        assert answer_on(wire)[0] == 200


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: -1\r\nhost: x\r\n\r\n", b"\0" * 9]
)
def test_what_is_not_http_is_refused_and_counted(quick, sent):
    before = counted(quick.service, 400)
    with quick.dial(sent) as wire:
        status, _, body = answer_on(wire)
    assert status == 400 and is_problem(body) and counted(quick.service, 400) == before + 1


def test_a_chunk_that_is_no_chunk_is_refused_and_its_request_forgotten(quick):
    headers = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    before = counted(quick.service, 499)
    with quick.dial(headers + b"2\r\n{}\r\n") as wire:
        time.sleep(0.05)
        wire.sendall(b"not hexadecimal\r\n")
        assert answer_on(wire)[0] == 400
        until(lambda: counted(quick.service, 499) == before + 1)


@pytest.mark.parametrize("rest", [b"not hexadecimal\r\n", b"5\r\nhello\r\nnor this\r\n"])
def test_a_request_that_was_refused_gets_no_second_answer_when_its_body_is_no_http(quick, rest):
    headers = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n"
    with quick.dial(headers) as wire:
        assert answer_on(wire)[0] == 415
        before = counted(quick.service, 400)
        wire.sendall(rest)
        assert ended(wire) and counted(quick.service, 400) == before


def test_an_answer_on_its_way_is_waited_for_and_no_longer_than_allowed(quick, monkeypatch):
    monkeypatch.setattr(quick.service, "image", b"\0" * 12_000_000)
    with quick.dial(request_bytes(), receive_buffer_bytes=32_768) as wire:
        wire.recv(1000)
        began = time.monotonic()
        asyncio.run(_answered(quick.server, began + 0.1))
        assert 0.1 <= time.monotonic() - began < 1
        waiting = threading.Thread(target=lambda: asyncio.run(_answered(quick.server, began + 10)))
        waiting.start()
        while waiting.is_alive():
            if select.select([wire], [], [], 0.02)[0]:
                wire.recv(1 << 20)
        assert time.monotonic() - began < 8


def test_one_connection_too_many_is_told_so_and_finds_a_place_later(quick, monkeypatch):
    monkeypatch.setattr(guard, "LINGER_S", 60)  # its end of the connection is closed at once all the same
    with contextlib.ExitStack() as open_:
        for _ in range(8):
            assert answer_on(open_.enter_context(quick.dial(GET)))[0] == 200
        wire = open_.enter_context(quick.dial(GET))
        status, headers, body = answer_on(wire)
        assert status == 503 and int(headers["retry-after"]) >= 1 and is_problem(body) and ended(wire)
    until(lambda: quick.connections == 0)
    with quick.dial(GET) as wire:
        assert answer_on(wire)[0] == 200


def test_far_too_many_connections_are_closed_without_a_word(quick, monkeypatch):
    monkeypatch.setattr(guard, "LINGERING", 0)
    with contextlib.ExitStack() as open_:
        for _ in range(8):
            assert answer_on(open_.enter_context(quick.dial(GET)))[0] == 200
        assert ended(open_.enter_context(quick.dial()))


def test_slow_clients_hinder_nobody():
    with serving(FakeService()) as served, contextlib.ExitStack() as open_:
        for _ in range(100):
            open_.enter_context(served.dial(request_bytes()[:-3]))
            open_.enter_context(served.dial(b"GET /health HTTP"))
        began = time.monotonic()
        with served.dial(GET) as wire:
            assert answer_on(wire)[0] == 200 and time.monotonic() - began < 1


def test_a_body_that_was_refused_is_not_waited_for(quick):
    with quick.dial(request_bytes(content_length="100000000")) as wire:
        assert answer_on(wire)[0] == 413
        began = time.monotonic()
        dribble(wire, b" " * 100)
        assert ended(wire) and time.monotonic() - began < 3


def test_after_a_refused_body_has_arrived_its_connection_is_good_for_more(quick, monkeypatch):
    monkeypatch.setattr(guard, "KEEP_ALIVE_S", 0.5)
    length = quick.service.settings.limits.body_bytes + 1
    with quick.dial(request_bytes("", content_length=str(length))) as wire:
        assert answer_on(wire)[0] == 413
        wire.sendall(b" " * (length - 2))
        time.sleep(0.1)
        wire.sendall(GET)
        assert answer_on(wire)[0] == 200
    with quick.dial(request_bytes("", content_length=str(length))) as wire:
        assert answer_on(wire)[0] == 413
        wire.sendall(b" " * (length - 2))
        assert ended(wire)  # idle connections are closed after this, too


def test_a_client_that_reads_nothing_is_dropped(quick, monkeypatch):
    monkeypatch.setattr(quick.service, "image", b"\0" * 12_000_000)
    with quick.dial(request_bytes(), receive_buffer_bytes=4096):
        until(lambda: quick.service.jobs and quick.service.jobs[-1].ended)
        until(lambda: quick.connections == 0, seconds=4)


def test_small_answers_are_not_held_back(quick):
    with quick.dial(GET) as wire:
        assert answer_on(wire)[0] == 200
        (connection,) = quick.server.server_state.connections
        assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_stops_reading_is_dropped(quick, monkeypatch):
    monkeypatch.setattr(quick.service, "image", b"\0" * 12_000_000)
    with quick.dial(request_bytes(), receive_buffer_bytes=32_768) as wire:
        for _ in range(12):
            wire.recv(32_768)
            time.sleep(0.04)
        assert quick.connections == 1
        until(lambda: quick.connections == 0, seconds=4)


def test_a_client_that_reads_slowly_gets_everything(quick, monkeypatch):
    monkeypatch.setattr(quick.service, "image", b"\0" * 12_000_000)
    with quick.dial(request_bytes(), receive_buffer_bytes=32_768) as wire:
        read = 0
        for _ in range(20):
            read += len(wire.recv(32_768))
            time.sleep(0.04)
        while piece := wire.recv(1 << 20):
            read += len(piece)
            if read > 16_000_000:
                break
        assert read > 16_000_000


@pytest.mark.parametrize("more", [b"", b"GET /heal", GET * 3], ids=["nothing", "half a request", "requests"])
@pytest.mark.parametrize("upgrade", [False, True])
def test_a_client_that_leaves_is_seen_to_leave_whatever_it_sent_ahead(quick, monkeypatch, more, upgrade):
    monkeypatch.setattr(quick.service, "script", None)
    headers = {"connection": "upgrade", "upgrade": "h2c"} if upgrade else {}
    count = len(quick.service.jobs)
    with quick.dial(request_bytes(**headers)) as wire:
        until(lambda: len(quick.service.jobs) > count)
        time.sleep(0.02)
        wire.sendall(more)
        time.sleep(0.02)
        assert quick.service.held
    until(lambda: not quick.service.held, seconds=2)


def test_a_client_that_sends_too_much_ahead_is_dropped(quick, monkeypatch):
    monkeypatch.setattr(quick.service, "script", None)
    with quick.dial(request_bytes()) as wire:
        until(lambda: quick.service.held)
        with contextlib.suppress(ConnectionError):
            wire.sendall(GET * 2000)
        assert ended(wire)
    until(lambda: not quick.service.held, seconds=2)


def test_an_upgrade_that_is_not_offered_is_passed_over(quick):
    with quick.dial(GET[:-2] + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n" + GET) as wire:
        assert [answer_on(wire)[0], answer_on(wire)[0]] == [200, 200]
