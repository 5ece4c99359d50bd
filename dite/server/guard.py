"""Between a socket and the app: what uvicorn leaves to a proxy, done here because a server on a laptop has none.

    a client that ...                                          plain uvicorn              here
    doesn't finish its headers, first or later ones            waits forever              408 after header_timeout_s
    sends more than 16 KiB of headers at once                  takes up to 256 KiB        431
    goes on sending a body that was refused                    waits forever              dropped after body_timeout_s
    doesn't read its answer                                    waits forever              dropped after send_timeout_s
    sends its next request early, then leaves                  isn't seen to leave        is
    is one too many                                            is served                  503 at once

Written against uvicorn's H11Protocol, whose attributes it reads; test_guard fails where a new version has others.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dite.server.metrics import Metrics
from dite.server.problems import Problem
from dite.server.settings import Limits

HEADER_BYTES = 16 * 1024
PIECE_BYTES = 4 * 1024  # what h11 is given at a time: it measures headers only where they end beyond what it was given
EARLY_BYTES = HEADER_BYTES  # of further requests, while one is being answered
KEEP_ALIVE_S = 30.0  # longer than clients keep idle connections (5 s, mostly): else both ends may decide at once, and a request is lost
LINGER_S = 1.0  # for a refused client to read why, before what it still sends resets the connection
LINGERING = 64  # refused connections open at once; more are closed without a word
SLOWEST_BYTES_PER_S = 4 * 1024
UNSENT_BYTES = 64 * 1024


def guarded_protocol(limits: Limits, metrics: Metrics | None = None) -> type[GuardedProtocol]:
    """For `uvicorn.Config(http=...)`. What is refused here never reaches the app; `metrics` counts it by its status code."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits, "metrics": metrics})


class Outbox:
    """A transport that doesn't wait forever for its reader.

    Whenever bytes have been pending for `timeout_s`, in that time all of them must have left, or SLOWEST_BYTES_PER_S: else the connection is aborted.
    An answer is in here as a whole while its client has yet to read it, so that no timeout in the app could see this.
    """

    def __init__(self, transport: Any, timeout_s: float, loop: asyncio.AbstractEventLoop):
        self._transport, self._timeout_s, self._loop = transport, timeout_s, loop
        self._written = 0
        self._timer: asyncio.TimerHandle | None = None
        wire = transport.get_extra_info("socket")
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it on sockets of its own making only; without, answers take 40 ms
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # else the kernel takes megabytes at a time, and a slow reader looks like none
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, now or later."""
        self._written += len(data)
        self._transport.write(data)
        if self._timer is None and self.get_write_buffer_size():
            self._watch()

    def forget(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        pending = self.get_write_buffer_size()
        self._timer = self._loop.call_later(self._timeout_s, self._check, pending, self._written - pending) if pending else None

    def _check(self, pending_then: int, sent_then: int) -> None:
        sent = self._written - self.get_write_buffer_size() - sent_then
        if sent < min(pending_then, SLOWEST_BYTES_PER_S * self._timeout_s):
            self._transport.abort()
        else:
            self._watch()


class GuardedProtocol(H11Protocol):
    """One connection. At most one of its deadlines runs at a time: for headers, or for a body that nobody wants any more."""

    limits: Limits
    metrics: Metrics | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn = h11.Connection(h11.SERVER, HEADER_BYTES)
        self.timeout_keep_alive = KEEP_ALIVE_S
        self._awaited: str | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        super().connection_made(Outbox(transport, self.limits.send_timeout_s, self.loop))
        excess = len(self.connections) - self.limits.connections
        if excess > LINGERING:
            self._refused = True
            self.transport.abort()
        elif excess > 0:
            message = f"{self.limits.connections} connections are open, and no more may be"
            self._refuse(Problem(503, "too_many_connections", message, retry_after_s=1))
        else:
            self._await("headers", self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._await(None)
        self._unset_keepalive_if_required()
        self.transport.forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        for start in range(0, len(data), PIECE_BYTES):
            if self._refused or self.transport.is_closing():
                return
            super().data_received(data[start : start + PIECE_BYTES])
        self._look()

    def on_response_complete(self) -> None:
        """Called when an answer has been handed over."""
        super().on_response_complete()
        self._look()

    @property
    def is_answering(self) -> bool:
        """Whether an answer is being made, or bytes of one have yet to leave."""
        return (self.cycle is not None and not self.cycle.response_complete) or self.transport.get_write_buffer_size() > 0

    def send_400_response(self, msg: str) -> None:
        """Called for bytes that aren't HTTP."""
        if len(self.conn.trailing_data[0]) > HEADER_BYTES:
            self._refuse(Problem(431, "headers_too_large", f"the request's headers must have at most {HEADER_BYTES} bytes"))
        else:
            self._refuse(Problem(400, "invalid_http", "this is not an HTTP/1.1 request"))

    def _look(self) -> None:
        """See what the connection waits for now."""
        theirs = self.conn.their_state
        answered = self.cycle is None or self.cycle.response_complete
        early = len(self.conn.trailing_data[0])
        if self._refused or self.transport.is_closing():
            return
        if theirs is h11.IDLE and (early or self.cycle is None):
            self._await("headers", self.limits.header_timeout_s)
        elif theirs is h11.SEND_BODY and answered:
            self._await("rest of a body", self.limits.body_timeout_s)
        else:
            self._await(None)
        if theirs is h11.IDLE and answered and not early and self._awaited is None and self.timeout_keep_alive_task is None:
            # uvicorn sets it when an answer is complete, and takes it back when the rest of that request's body arrives
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if theirs in (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL) and self.flow.read_paused:
            if early > EARLY_BYTES:
                self.transport.close()
            else:
                self.flow.resume_reading()  # who isn't read isn't seen to leave

    def _await(self, what: str | None, seconds: float = 0.0) -> None:
        """Wait for `what`, with the deadline that was set when waiting for it began."""
        if what == self._awaited:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._awaited = what
        self._deadline = self.loop.call_later(seconds, self._late) if what else None

    def _late(self) -> None:
        if self._awaited == "headers" and self.conn.trailing_data[0]:
            self._refuse(Problem(408, "header_timeout", f"a request's headers must arrive within {self.limits.header_timeout_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer without the app, and close: at once in our direction, a moment later in theirs. What has been answered already isn't again."""
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._say(problem)
        if self.transport.can_write_eof():
            with suppress(OSError):  # the client may have reset the connection already
                self.transport.write_eof()
        if self.cycle is not None:
            self.cycle.disconnected = True  # the app has nothing to add
            self.cycle.message_event.set()
        self._await("its leaving", LINGER_S)

    def _say(self, problem: Problem) -> None:
        if self.metrics is not None:
            self.metrics.request_done(problem.status)
        body = json.dumps(problem.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"} | problem.headers()
        lines = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
