"""What a server's clients got, judged. An accepted request is *lost* unless it ends in exactly one well-formed reply."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from dite_evals.serving import Answer

ERROR_KEYS = {"message", "type", "param", "code"}
SHOWN = 3  # reasons a row quotes
COMPLETED, PARTIAL = "image_generation.completed", "image_generation.partial_image"


@dataclass(frozen=True)
class Reply:
    """A reply, read. `wrong` says what is not well-formed about it; `code` is that of its error, `pictures` are decoded files."""

    status: int
    code: str | None = None
    pictures: tuple[bytes, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def drawn(self) -> bool:
        """Whether it has all pictures that were asked for."""
        return self.wrong is None and self.status == 200 and self.code is None


def read(answer: Answer, n: int = 1) -> Reply:
    """Judge the reply to a request for `n` pictures."""
    if answer.status == 0:
        return Reply(0, wrong="a reply that broke off" if answer.begun else "no reply")
    try:
        if "text/event-stream" in answer.headers.get("content-type", ""):
            return _stream(answer, n)
        document = json.loads(answer.body)
        if answer.status != 200:
            return Reply(answer.status, code=_error(document, answer))
        pictures = tuple(_picture(one["b64_json"], document["size"], document["output_format"]) for one in document["data"])
        if len(pictures) != n:
            raise Malformed(f"{len(pictures)} pictures instead of {n}")
        return Reply(200, pictures=pictures, facts=document["dite"])
    except Malformed as error:
        return Reply(answer.status, wrong=str(error))
    except (ValueError, KeyError, TypeError) as error:
        return Reply(answer.status, wrong=f"{type(error).__name__} while reading it")


class Malformed(Exception):
    """A reply that isn't what the API promises."""


def is_error(document: Any) -> bool:
    """Whether this is the one shape of our errors.

    >>> is_error({"error": {"message": "no", "type": "t", "param": None, "code": "c"}}), is_error({"detail": "no"})
    (True, False)
    """
    error = document.get("error") if isinstance(document, dict) else None
    return isinstance(error, dict) and set(error) == ERROR_KEYS and bool(error["message"]) and bool(error["type"]) and bool(error["code"])


def _error(document: Any, answer: Answer) -> str:
    shape = {"error": document.get("error")} if isinstance(document, dict) else document
    if not is_error(shape):
        raise Malformed("an error of another shape")
    if answer.status == 429 and not answer.headers.get("retry-after", "").isdigit():
        raise Malformed("429 without Retry-After")
    return shape["error"]["code"]


def _picture(text: str, size: str, kind: str) -> bytes:
    """A picture's file, decoded to be sure that it can be."""
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            found = (image.format or "").lower(), "{}x{}".format(*image.size)
    except (OSError, binascii.Error, SyntaxError) as error:
        raise Malformed(f"a picture that can't be decoded: {type(error).__name__}") from None
    if found != (kind, size):
        raise Malformed(f"a picture that is {found} and not {(kind, size)}")
    return data


def events(body: bytes) -> list[dict[str, Any]]:
    """The documents of a stream."""
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: ")]


def _stream(answer: Answer, n: int) -> Reply:
    told = events(answer.body)
    ends = [one for one in told if one["type"] in (COMPLETED, "error")]
    if not ends or told[-len(ends) :] != ends:
        raise Malformed("a stream without an end, or with more behind it")
    if ends[0]["type"] == "error":
        if len(ends) > 1:
            raise Malformed("a stream with two ends")
        return Reply(answer.status, code=_error(ends[0], answer))
    for one in told:
        if one["type"] == PARTIAL:
            _picture(one["b64_json"], one["size"], one["output_format"])
    pictures = tuple(_picture(one["b64_json"], one["size"], one["output_format"]) for one in ends)
    if len(pictures) != n:
        raise Malformed(f"{len(pictures)} pictures instead of {n}")
    return Reply(200, pictures=pictures, facts=ends[0]["dite"])


def is_black(picture: bytes) -> bool:
    """Whether a picture has only zeros: what NaN becomes where nobody looks."""
    with Image.open(io.BytesIO(picture)) as image:
        return all(high == 0 for _, high in image.convert("RGB").getextrema())


class Tally:
    """Replies, counted by what they came to."""

    def __init__(self):
        self.outcomes: Counter[str] = Counter()
        self.lost: list[str] = []

    def count(self, answer: Answer, n: int = 1) -> Reply:
        """Read a reply and count it."""
        reply = read(answer, n)
        if reply.wrong:
            self.lost.append(f"{reply.status}: {reply.wrong}")
        else:
            self.outcomes["pictures" if reply.drawn else f"{reply.status} {reply.code}"] += 1
        return reply

    @property
    def requests(self) -> int:
        """How many replies were counted."""
        return self.outcomes.total() + len(self.lost)

    def row(self) -> dict[str, Any]:
        """Counts for a result."""
        reasons = {"lost_because": self.lost[:SHOWN]} if self.lost else {}
        return {"requests": self.requests, "answered": dict(sorted(self.outcomes.items())), "lost": len(self.lost)} | reasons


def verdict(goal: str, trials: int, failures: int, checks: dict[str, bool], **figures: Any) -> dict[str, Any]:
    """A row of results. `failures` of `trials` went wrong; without any, their rate is at most 3/n with 95% confidence (the rule of three)."""
    bound = {} if failures or not trials else {"failure_rate_at_most": round(min(1.0, 3 / trials), 6)}
    missed = [name for name, holds in checks.items() if not holds]
    return {"goal": goal, "trials": trials, "failures": failures, **bound, **figures, "missed": missed, "ok": not missed}


def rounded(seconds: float) -> float:
    """To tenths of a millisecond."""
    return round(seconds, 4)
