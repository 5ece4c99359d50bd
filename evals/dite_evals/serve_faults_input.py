"""What clients send as the fault: requests that are malformed, too large, or no HTTP at all. See dite_evals.serve_faults.

Every case is drawn from a seed of its own, so that a case that fails can be made again by its number.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dite_evals.serve_replies import is_error, read, verdict
from dite_evals.serving import PICTURES, UNANSWERED, Answer, Server, connected, draw, read_head, read_rest, served

THREADS = 1  # of a rank
CLIENTS = 8
PATIENCE_S = 20.0
BODY_BYTES = 4096
HEADERS_S = 0.5
RETRIES = 2
# Valid requests come out of this too: they have to be cheap. Incomplete ones are waited for.
FUZZED = ("--max-batch", "4", "--set", "limits.steps=8", "--set", "limits.images=2", "--set", f"limits.body_bytes={BODY_BYTES}")
FUZZED += ("--set", f"limits.header_timeout_s={HEADERS_S}", "--set", f"limits.body_timeout_s={HEADERS_S}")

VALID = {"prompt": "class:3", "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 0, "n": 1}
FIELDS = [*VALID, "model", "size", "response_format", "output_format", "stream", "partial_images", "class_labels", "negative_prompt", "timeout_s"]
FIELDS += ["progress", "user", "quality", "style", "background", "moderation"]
PATHS = ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/cat", "/v1/status", PICTURES, "/page.js", "/page.css", "*", "//", "/%00"]
PATHS += ["/../../etc/passwd", "/page/../page.js", "/v1/images/generations/", "/v1/models/%2e%2e%2fsecret", "/v1/images", "/?a=b", "/v1/models/"]
PATHS += [
    "http://localhost/health",
    "/\u00e9",
    "/v1/models/" + "a" * 3000,
    "/v1/status?prompt=secret#x",
    "/ready?",
    "/%ff%fe",
    "/v1/models?model=%0d%0a",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PRI", "get", "POSTS", "A" * 40, "!#$%", "GE T", ""]
JUNK = [b"", b"\0", b"\r\n", b"\r\n\r\n", b"\n", b" ", b"\xff", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]


@dataclass(frozen=True)
class Case:
    """Bytes to send. `complete`: they hold a whole request, which has to be answered at once, however wrong it is."""

    kind: str
    data: bytes
    complete: bool = False


def make(number: int) -> Case:
    """Case `number`, always the same."""
    chance = random.Random(number)
    kinds = {_body: 55, _length: 5, _headers: 15, _target: 15, _bent: 7, _noise: 3}
    return chance.choices(list(kinds), list(kinds.values()))[0](chance)


def _value(chance: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say, seldom what a field wants."""
    word = "".join(chance.choices("abc \u00e9\u4e2d\U0001f600\ud800\0\n\"\\<'%{}", k=chance.choice((0, 1, 5, 60, 300))))
    numbers = [0, -1, 1, 2, 3, 10, 65, 251, 1001, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**25, 0.5, -0.0, 1e308, 1e-320, 100.5]
    found = [word, *numbers, True, False, None, "", "auto", "32x32", "0x0", "99999x99999", "b64_json", "url", "class:3", "png", "webp", "jpeg"]
    found += [[], {}, [3], ["cat", 4], [[]], "class:-1", " ", "\u0663", "3", 3]
    if depth < 3:
        found += [[_value(chance, depth + 1)], {word: _value(chance, depth + 1)}]
    return chance.choice(found)


def _document(chance: random.Random) -> str:
    document: dict[str, Any] = dict(VALID)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        document[chance.choice((*FIELDS, *FIELDS, str(_value(chance, 9)), "promt"))] = _value(chance)
    for _ in range(chance.choice((0, 0, 0, 1))):
        document.pop(chance.choice(list(document)), None)
    return json.dumps(document, ensure_ascii=chance.random() < 0.5)


def _body(chance: random.Random) -> Case:
    """A body of the right length that isn't a good request, or is one by chance."""
    text = _document(chance)
    deep = chance.choice(("[", '{"a":', "[[", '{"prompt":['))
    others: list[Callable[[], bytes]] = [
        lambda: bytes(chance.randrange(256) for _ in range(chance.randrange(200))),
        lambda: text.encode("utf-16", "surrogatepass"),
        lambda: b"\xef\xbb\xbf" + _bytes(text),
        lambda: _bytes(text).replace(b"}", b', "seed": 1, "seed": 2}', 1),
        lambda: _bytes(text).replace(b": 2", b": " + chance.choice((b"NaN", b"Infinity", b"1e999", b"9" * 30, b"0x2", b"02", b"+2", b"2.", b"-")), 1),
        lambda: deep.encode() * chance.choice((10, 500, 900, 3900)),
        lambda: _bytes(text)[: chance.randrange(len(text))],
        lambda: _bytes(json.dumps(_value(chance))),
        lambda: _bytes(text) + b" " * chance.choice((BODY_BYTES - 200, BODY_BYTES, BODY_BYTES * 3, 100_000)),
        lambda: b"",
    ]
    body = _bytes(text) if chance.random() < 0.6 else chance.choice(others)()
    return Case("body", _post(body), complete=True)


def _length(chance: random.Random) -> Case:
    """A length that isn't the body's."""
    body = _bytes(_document(chance))
    length = chance.choice(
        (str(len(body) + 5), str(len(body) - 5), "-1", "1e3", "", "0", "99999999999999999999", "\u0663", f"{len(body)}, {len(body)}", "+5")
    )
    return Case("length", _post(body, **{"content-length": length}))


def _headers(chance: random.Random) -> Case:
    """A good body behind odd headers."""
    body = _bytes(json.dumps(VALID))
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    odd: list[dict[str, str]] = [
        {"content-type": chance.choice(("text/plain", "", "application/json; charset=latin-1", "multipart/form-data; boundary=x", "\u00ff", "json"))},
        {"content-encoding": chance.choice(("gzip", "br", "identity", "x" * 200))},
        {"authorization": chance.choice(("Bearer", "Basic eDp5", "Bearer \u00ff", "x" * 9000))},
        {"x-many": "a" * chance.choice((100, 9000, 15_000, 17_000, 70_000))},
        {f"x-{number}": "y" for number in range(chance.choice((50, 500, 1500)))},
        {"host": chance.choice(("", "a b", "\u00e9", "localhost:99999", "x" * 3000))},
        {"expect": chance.choice(("100-continue", "200-ok"))},
        {"connection": "upgrade", "upgrade": chance.choice(("h2c", "websocket", "TLS/1.0"))},
        {"x-folded": "a\r\n b", "range": "bytes=0-1"},
        {"bad name": "x"},
        {"x-nul": "a\0b"},
        {"": "x"},
        {"accept": "image/*;q=0", "accept-encoding": "\u00e9", "cookie": "=;=;" * 50, "forwarded": 'for="', "x-forwarded-for": "::::"},
    ]
    if chance.random() < 0.2:
        coding = chance.choice(("chunked", "gzip, chunked", "Chunked", "chunked, chunked", "identity", "\u00e9"))
        bent = chance.choice((chunked, chunked, chunked[:-5], b"zz\r\n" + body, b"fffffffffffffffff\r\n" + body, chunked.replace(b"\r\n", b"\n")))
        length = {} if chance.random() < 0.5 else {"content-length": str(len(body))}
        return Case("chunks", _post(bent, **{"transfer-encoding": coding, "content-length": None} | length))
    return Case("headers", _post(body, **chance.choice(odd)))


def _target(chance: random.Random) -> Case:
    """Methods, URLs and versions."""
    path = chance.choice(PATHS)
    if chance.random() < 0.3:
        path += "".join(chance.choices("/%.?#&=a0\u00e9\\;\t", k=chance.randrange(1, 12)))
    version = chance.choices(("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "", "http/1.1"), (80, 10, 3, 3, 2, 2))[0]
    return Case("target", f"{chance.choice(METHODS)} {path} {version}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


def _bent(chance: random.Random) -> Case:
    """A good request with some bytes changed, lost, doubled or strewn in."""
    data = bytearray(_post(_bytes(json.dumps(VALID))))
    for _ in range(chance.choice((1, 1, 2, 8))):
        at, size = chance.randrange(len(data) or 1), chance.choice((1, 1, 2, 20))
        piece = bytes(chance.randrange(256) for _ in range(size))
        match chance.randrange(5):
            case 0:
                data[at : at + size] = piece
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * 2
            case 3:
                data[at:at] = chance.choice((piece, *JUNK))
            case 4:
                data = data[: max(1, at)]
    return Case("bent", bytes(data))


def _noise(chance: random.Random) -> Case:
    """No request at all."""
    piece = bytes(chance.randrange(256) for _ in range(chance.choice((1, 10, 1000, 30_000))))
    return Case("noise", chance.choice((chance.choice(JUNK), piece, chance.choice(JUNK) + piece)))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _post(body: bytes, **changes: str | None) -> bytes:
    """A request for pictures; a change to None leaves a header out."""
    fields: dict[str, str | None] = {"host": "localhost", "connection": "close", "content-type": "application/json", "content-length": str(len(body))}
    lines = [f"POST {PICTURES} HTTP/1.1", *(f"{name}: {value}" for name, value in (fields | changes).items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


async def malformed(count: int, model: str) -> dict[str, Any]:
    """`count` requests that are wrong in some way, or right by chance."""
    with served(model, *FUZZED, threads=THREADS) as server:
        return await malformed_of(server, count)


async def malformed_of(server: Server, count: int, first: int = 0) -> dict[str, Any]:
    """The same of a server with the settings FUZZED; cases `first` and later."""
    statuses: Counter[str] = Counter()
    bad: dict[str, list[int]] = {"server_error": [], "other_shape": [], "unanswered": [], "hung": []}
    numbers = iter(range(first, first + count))

    async def client() -> None:
        for number in numbers:
            case = make(number)
            answer = await send(server, case)
            for _ in range(RETRIES):  # where this process stood still between connecting and sending, the server was right to hang up
                if answer.status or answer.seconds < HEADERS_S or not case.complete:
                    break
                statuses["sent again"] += 1
                answer = await send(server, case)
            statuses[str(answer.status) if answer.status else "closed"] += 1
            if (wrong := _wrong(case, answer)) is not None:
                bad[wrong].append(number)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    alive = read(await draw(server.address, num_inference_steps=2))
    status, mistakes = await server.status(), [one for one in server.logged() if one["event"] in ("mistake", "library")]
    checks = {
        "no 5xx": not bad["server_error"],
        "every 4xx in the error shape": not bad["other_shape"],
        "whole requests answered": not bad["unanswered"],
        "nothing hung": not bad["hung"],
        "pictures afterwards": alive.drawn and status["restarts"] == 0 and status["state"] == "ready",
        "no mistake logged": not mistakes,
    }
    figures = {name: {"count": len(found), "cases": found[:5]} for name, found in bad.items() if found}
    goal = "0 5xx, every 4xx in the shape of our errors, nothing hung"
    return verdict(
        goal, count, sum(map(len, bad.values())), checks, cases={"first": first, "count": count}, answered=dict(sorted(statuses.items())), **figures
    )


def _wrong(case: Case, answer: Answer) -> str | None:
    if answer.status >= 500 and not (answer.status == 504 and _kept_waiting(case, answer)):
        return "server_error"
    if answer.status == 0 and answer.seconds > PATIENCE_S:
        return "hung"
    if answer.status == 0:
        return "unanswered" if case.complete or answer.begun else None
    if answer.status >= 400:
        try:
            document = json.loads(answer.body or b"null")
        except ValueError:
            document = None
        return None if is_error(document) or case.data.startswith(b"HEAD ") else "other_shape"
    if answer.status == 200 and case.kind == "body":
        return None if read(answer, _count(case)).drawn else "other_shape"
    return None if 200 <= answer.status < 400 else "other_shape"


def _kept_waiting(case: Case, answer: Answer) -> bool:
    """Whether a sound request named the time that it would wait for its pictures, and that time was up: then 504 is the answer that it asked for."""
    asked = _asked(case).get("timeout_s") if case.kind == "body" and case.complete else None
    return isinstance(asked, int | float) and answer.seconds >= asked


def _asked(case: Case) -> dict[str, Any]:
    """The document in a case's body; empty where there is none."""
    try:
        document = json.loads(case.data.partition(b"\r\n\r\n")[2])
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _count(case: Case) -> int:
    """How many pictures a good body asks for."""
    return _asked(case).get("n") or 1


async def send(server: Server, case: Case) -> Answer:
    """Send bytes, and read one reply, or that there is none."""
    began, begun = time.perf_counter(), False
    try:
        async with asyncio.timeout(PATIENCE_S), connected(server.address) as (reader, writer):
            writer.write(case.data)
            status = 100
            while 100 <= status < 200:
                status, headers = await read_head(reader)
                begun = True
            bare = case.data.startswith(b"HEAD ") or status in (204, 304)
            return Answer(status, b"" if bare else await read_rest(reader, headers), time.perf_counter() - began, headers)
    except UNANSWERED:
        return Answer(0, b"", time.perf_counter() - began, begun=begun)
