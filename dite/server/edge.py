"""The outermost layer of the app: a request is let in by its key, answered once, counted, logged and cleaned up after, whatever happens inside."""

from __future__ import annotations

import hmac
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
from dite.server.settings import ServerSettings

KEYLESS = frozenset({"/health", "/ready", "/", "/page.js", "/page.css"})  # probes, and a page that holds no secrets
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
                if self._lets_in(scope):
                    await self.app(scope, receive, sending)
                else:
                    await answer(_no_key())(scope, receive, sending)
        except Exception as error:
            trace.status = 500
            log("mistake", request=trace.id, job=trace.job, **failure(error))
            if not trace.begun:
                await answer(mistake(trace.id))(scope, receive, sending)
        finally:
            self._record(scope, trace)

    def _lets_in(self, scope: Scope) -> bool:
        """Whether the request needs no key, or brings it."""
        if self._key is None or scope["path"] in KEYLESS:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key)

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


def _no_key() -> Problem:
    return Problem(401, "invalid_api_key", "this server needs its key: send the header Authorization: Bearer KEY")
