"""Reading a request's body without trusting its length, its type, or its client's pace."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from dite.server.answers import client_left
from dite.server.problems import Problem
from dite.server.settings import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request. Raises Problem: 413 too long, 415 not JSON, 408 too slow, 499 gone."""
    check_headers(request.headers, limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_long(limits, "more")
    except TimeoutError:
        message = f"the body must arrive within {limits.body_timeout_s:g} s; {len(body)} bytes of it did"
        raise Problem(408, "body_timeout", message) from None
    except ClientDisconnect:
        raise client_left() from None
    return bytes(body)


def check_headers(headers: Headers, limits: Limits) -> None:
    """Refuse what a body's headers say of it, before it is read.

    A web page of another site can send JSON here only after asking first, which nothing here answers; as text/plain it could without.
    """
    kind = headers.get("content-type", "")
    name, _, parameters = kind.partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if name.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        message = f'content-type must be application/json (in UTF-8), not "{kind[:60]}"' if kind else "content-type: application/json is missing"
        raise Problem(415, "unsupported_media_type", message)
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise Problem(415, "unsupported_content_encoding", f'the body must not be compressed; its content-encoding is "{encoding[:60]}"')
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Problem(400, "invalid_header", f'content-length must be a number, not "{length[:60]}"')
    if len(length) > 18 or int(length) > limits.body_bytes:
        raise _too_long(limits, length[:18])


def _too_long(limits: Limits, length: str) -> Problem:
    return Problem(413, "body_too_large", f"the body must have at most {limits.body_bytes} bytes, not {length}")
