"""The server's routes. They know HTTP and nothing of processes: a service draws, or says why not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import dite
from dite.server.answers import Json, answer
from dite.server.bodies import read_body
from dite.server.edge import PICTURES, Edge, Trace
from dite.server.job import Event, Partial, Pictures, Progress
from dite.server.problems import Problem
from dite.server.protocol import Answer, Asked, parse, progress_event, read_request
from dite.server.streaming import EventStream, unless_left, within

if TYPE_CHECKING:
    from dite.server.service import Service

PAGE = Path(__file__).with_name("page")
PAGE_TYPES = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}
GRACE_S = 10.0  # a job that its service hasn't ended so long after its deadline is given up


def create_app(service: Service) -> FastAPI:
    """The HTTP side of `service`. Every error it answers with is a Problem's body."""
    app = FastAPI(title="dite", version=dite.__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Edge, settings=service.settings, metrics=service.metrics)
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    routes = Routes(service)
    for path, endpoint in {
        "/health": routes.health,
        "/ready": routes.ready,
        "/metrics": routes.metrics,
        "/v1/models": routes.models,
        "/v1/models/{model:path}": routes.model,
        "/v1/status": routes.status,
        "/": routes.page,
        "/page.js": routes.page,
        "/page.css": routes.page,
    }.items():
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"])
    app.add_api_route(PICTURES, routes.generate, methods=["POST"])
    return app


class Permits:
    """How many requests for pictures may be read, waiting or drawn at once. The other connections stay free for probes and metrics."""

    def __init__(self, connections: int):
        self.most = max(1, connections * 3 // 4)
        self.held = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold one. Raises Problem 429."""
        if self.held >= self.most:
            raise Problem(429, "too_many_requests", f"{self.held} requests are being answered, and {self.most} are the most", retry_after_s=1.0)
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1


class Routes:
    """One method for each route."""

    def __init__(self, service: Service):
        self.service, self.settings = service, service.settings
        self.permits = Permits(self.settings.limits.connections)
        self.created = int(time.time())

    async def generate(self, request: Request) -> Response:
        """Draw pictures; as one answer, or as a stream of events."""
        service, trace = self.service, Trace.of(request.scope)
        trace.cleanup.enter_context(self.permits.one())
        if service.card is None:
            raise Problem(503, "starting", "the model is being loaded", retry_after_s=5.0)
        asked = read_request(parse(await read_body(request, self.settings.limits)), service.card, self.settings)
        job = service.submit(asked.request, asked.timeout_s)
        trace.job = job.id
        trace.cleanup.callback(service.cancel, job)
        said = Answer(asked.request, self.settings.served_name, int(time.time()))
        allowed_s = (asked.timeout_s or self.settings.limits.request_timeout_s) + GRACE_S
        if asked.stream:
            return EventStream(job.events(), Telling(asked, said, trace), allowed_s)
        pictures = await unless_left(request.receive, within(allowed_s, job.outcome()))
        return Json(said.to_json(pictures, trace.seconds))

    async def health(self) -> Response:
        """Whether this process answers."""
        return Json({"status": "alive"})

    async def ready(self) -> Response:
        """Whether a picture asked for now would be drawn."""
        return Json({"status": self.service.state}, 200 if self.service.is_ready else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        body, kind = self.service.metrics.render()
        return Response(body, headers={"content-type": kind})

    async def models(self) -> Response:
        """The one model."""
        return Json({"object": "list", "data": [self._model()]})

    async def model(self, model: str) -> Response:
        """The one model, by its name."""
        if model != self.settings.served_name:
            message = f'no model "{model[:60]}" is served here; this server has "{self.settings.served_name}"'
            raise Problem(404, "model_not_found", message, param="model")
        return Json(self._model())

    async def status(self) -> Response:
        """What the page shows: the service's state, the model, what requests may ask for, and what they get when they don't."""
        settings, card = self.settings, self.service.card
        size = "{}x{}".format(*card.default_size_px) if card else None
        defaults = {"n": 1, "size": size, "steps": settings.steps, "guidance": settings.guidance, "output_format": "png"}
        document = self.service.status() | {"version": dite.__version__, "card": card and card.to_json()}
        return Json(document | {"defaults": defaults, "limits": settings.limits.model_dump()})

    async def page(self, request: Request) -> Response:
        """The three files of the page."""
        name = request.scope["path"].strip("/") or "index.html"  # request.url is made of the Host header as well
        kind = PAGE_TYPES[name]
        try:
            content = (PAGE / name).read_bytes()
        except FileNotFoundError:
            raise Problem(404, "no_page", f"this installation has no {name}") from None
        return Response(content, headers=PAGE_HEADERS, media_type=kind)

    def _model(self) -> dict[str, Any]:
        card = self.service.card
        return {"id": self.settings.served_name, "object": "model", "created": self.created, "owned_by": "dite", "dite": card and card.to_json()}


class Telling:
    """What a stream says of each event."""

    def __init__(self, asked: Asked, said: Answer, trace: Trace):
        self.asked, self.said, self.trace = asked, said, trace
        self._rounds: Counter[int] = Counter()  # partial images sent, by picture

    def __call__(self, event: Event) -> Iterator[dict[str, Any]]:
        """The documents to send."""
        match event:
            case Progress() if self.asked.progress:
                yield progress_event(event)
            case Partial():
                most = max(1, self.asked.request.partial_images)  # a job that is drawn again shows its early rounds again
                yield self.said.partial(event, min(self._rounds[event.index], most - 1))
                self._rounds[event.index] += 1
            case Pictures():
                yield from self.said.completed(event, self.trace.seconds)


async def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return answer(error)


async def _answer_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    reason = {404: "there is no such URL", 405: "this URL doesn't take that method"}.get(error.status_code, error.detail)
    problem = Problem(error.status_code, code, f"{reason}: {request.method[:16]} {request.scope['path'][:100]}")
    return Json(problem.body(), problem.status, problem.headers() | dict(error.headers or {}))


async def _answer_validation(request: Request, error: Exception) -> Response:
    """No route lets FastAPI check anything; should one ever, its words stay in our shape."""
    assert isinstance(error, RequestValidationError)
    return answer(Problem(422, "invalid_request", f"{len(error.errors())} parts of the request are wrong"))
