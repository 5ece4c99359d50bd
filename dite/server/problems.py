"""What a client is told when it gets no picture: one error type, in the shape that OpenAI's clients parse."""

from __future__ import annotations

import math
from typing import Any


class Problem(Exception):
    """Answered as `{"error": {message, type, param, code}}` with HTTP status `status`.

    `retry_after_s` becomes the header Retry-After. `retry=False` tells clients that retry 5xx on their own (x-should-retry) that it is no use.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None, retry: bool | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after_s, self.retry = status, code, message, param, retry_after_s, retry

    @property
    def type(self) -> str:
        """The family of errors that the status belongs to, in OpenAI's words."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.retry is not None:
            headers["x-should-retry"] = "true" if self.retry else "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(param: str, message: str) -> Problem:
    """400: a field of the request is wrong; the message says the rule, the limit and the value."""
    return Problem(400, "invalid_value", message, param=param)
