"""The outermost layer of the app: a request is let in by its key, answered once, counted, logged and cleaned up after, whatever happens inside."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dite.server.answers import answer, mistake
from dite.server.logs import failure, log
from dite.server.metrics import Metrics
from dite.server.problems import Problem
from dite.server.settings import ServerSettings, is_loopback

PROBES = frozenset({"/health", "/ready"})
KEYLESS = PROBES | {"/", "/page.js", "/page.css"}  # a page that holds no secrets
UNCOUNTED = frozenset({"/health", "/ready", "/metrics"})  # what monitoring itself asks for
UNLOGGED = UNCOUNTED | {"/v1/status"}  # asked for every few seconds
PICTURES = "/v1/images/generations"


@dataclass
class Trace:
    """One request. `status` is what it came to: of a stream that failed half-way, not the 200 that it began with.

    What is put on `cleanup` happens when the request is over, however it ends.
    """

    started_s: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex[:16]}")
    status: int | None = None
    job: str | None = None
    begun: bool = False
    cleanup: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, scope: Scope) -> Trace:
        """That of a request being answered."""
        return scope["dite.trace"]

    @property
    def seconds(self) -> float:
        """Since its headers were read."""
        return time.monotonic() - self.started_s


class Edge:
    """ASGI middleware. No exception leaves it: a traceback that uvicorn printed could quote a prompt."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics):
        self.app, self.metrics = app, metrics
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key else None
        self._hosts = {settings.host, *(name.lower() for name in settings.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = scope["dite.trace"] = Trace()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.begun, trace.status = True, trace.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"], headers["x-content-type-options"] = trace.id, "nosniff"
            await send(message)

        try:
            with trace.cleanup:
                refusal = self._refusal(scope)
                await (self.app if refusal is None else answer(refusal))(scope, receive, sending)
        except Exception as error:
            trace.status = 500
            log("mistake", request=trace.id, job=trace.job, **failure(error))
            if not trace.begun:
                await answer(mistake(trace.id))(scope, receive, sending)
        finally:
            self._record(scope, trace)

    def _refusal(self, scope: Scope) -> Problem | None:
        """None for a request that needs no key, or brings it.

        A server without a key is this machine's own. A web page may give its own name this machine's address (DNS rebinding), and its visitors'
        browsers would then send it here and let the page read the answer: but under that name. Probes tell nothing, and balancers name any host.
        """
        if scope["path"] in PROBES:
            return None
        headers = Headers(scope=scope)
        if self._key is None:
            name = hostname(headers.get("host", "localhost"))  # browsers always send one
            return None if name in self._hosts or is_loopback(name) else _other_host(name)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scope["path"] in KEYLESS or (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key)):
            return None
        return Problem(401, "invalid_api_key", "this server needs its key: send the header Authorization: Bearer KEY")

    def _record(self, scope: Scope, trace: Trace) -> None:
        status = trace.status or 500
        if scope["path"] not in UNCOUNTED:
            self.metrics.request_done(status, trace.seconds if scope["path"] == PICTURES else None)
        if scope["path"] in UNLOGGED:
            return
        route: Any = scope.get("route")
        log(
            "request",
            request=trace.id,
            method=scope["method"][:16],
            route=getattr(route, "path", None),
            status=status,
            seconds=round(trace.seconds, 4),
            job=trace.job,
        )


def hostname(host: str) -> str:
    """The name or address in a Host header, without its port.

    >>> hostname("LocalHost:8000"), hostname("[::1]:8000"), hostname("127.0.0.1"), hostname("a:b:c")
    ('localhost', '::1', '127.0.0.1', '')
    """
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::[0-9]*)?", host.strip().lower())
    return (found[1] or found[2] or "") if found else ""


def _other_host(name: str) -> Problem:
    rule = "without a key this server answers to localhost, 127.0.0.1 and [::1]"
    return Problem(403, "unknown_host", f'{rule}, not to "{name[:60]}"; use one of those, start it with --api-key-file, or --set hosts')
