"""Answers as bytes: JSON documents, errors among them."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from dite.server.problems import Problem

CLIENT_LEFT = 499  # nginx's word for it; nobody reads it, but it is counted and logged


class Json(JSONResponse):
    """JSON in ASCII: what a client sent may come back in an error, and half a surrogate pair has no UTF-8."""

    def render(self, content: Any) -> bytes:
        """The document as bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def answer(problem: Problem) -> Json:
    """The error that a client is told of."""
    return Json(problem.body(), problem.status, problem.headers())


def client_left() -> Problem:
    """The client is gone."""
    return Problem(CLIENT_LEFT, "client_left", "the client closed the connection before the answer was finished")


def mistake(request_id: str) -> Problem:
    """500: an error that we did not foresee. Its text stays here; the log says where it was raised."""
    return Problem(500, "internal_error", f"the server made a mistake; its log says more under request {request_id}")
