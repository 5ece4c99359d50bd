"""What a server writes down: nothing of what its clients asked to see, whatever becomes of their requests. See dite_evals.serve_faults."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from dite_evals.serve_faults_input import BODY_BYTES, Case, send
from dite_evals.serve_models import break_class, reader
from dite_evals.serve_replies import verdict
from dite_evals.serving import PICTURES, READY_S, Server, call, draw, follow, head, served, until

THREADS = 1  # of a rank
WORD = "zebrasecret"  # in every request, and nowhere else
LASTING = ("--max-batch", "2", "--set", "max_restarts=1000", "--set", f"limits.body_bytes={BODY_BYTES}", "--set", "limits.steps=1000", "--verbose")


async def prompts_in_logs(count: int, model: str) -> dict[str, Any]:
    """Requests with a word in them that must not be found in any log, `count` rounds: good and malformed ones, ones that fail, ones that kill ranks.

    In turns on a model with classes, one of which is broken and called by the word, and on one that reads prompts and forgets their end.
    """
    carried, found, lines = 0, [], 0
    for text in (False, True):
        with tempfile.TemporaryDirectory(prefix="dite_faults_") as folder:
            saved = Path(folder) / "model"
            with served(reader(saved) if text else break_class(model, saved, WORD), *LASTING, threads=THREADS) as server:
                for number in range(count):
                    carried += await say(server, text) + await say_and_kill(server, text, number)
                server.process.send_signal(signal.SIGTERM)
                with suppress(TimeoutError):
                    await until(lambda: server.process.poll() is not None, 60)
                lines += len(server.logged())
                found += spoken(server)
    checks = {"not in the log": not found, "there is a log": lines > carried}
    figures = {"requests_with_the_word": carried, "lines_logged": lines, "lines_with_the_word": len(found)}
    return verdict("no word of a request in any log", carried, len(found), checks, **figures)


def spoken(server: Server) -> list[str]:
    """Lines of a server's log that hold the word."""
    return [line for line in server.log.read_text(errors="replace").splitlines() if WORD in line.lower()]


async def say(server: Server, text: bool) -> int:
    """Say the word to a server in many ways, one after the other; returns in how many requests."""
    requests = [*_asked(server, text), *_malformed(server)]
    for request in requests:
        await request
    return len(requests)


async def say_and_kill(server: Server, text: bool, number: int) -> int:
    """The same in requests that are left, and that lose their ranks."""
    subject = {"prompt": WORD, "size": "32x32"} if text else {"prompt": "class:3", "user": WORD}
    endless = subject | {"num_inference_steps": 1000 - number}  # each time another kind of request: kinds are refused for a while
    await _leaving(server, endless)
    await _killing(server, endless)
    return 3


def _asked(server: Server, text: bool) -> list[Any]:
    """Requests in good form, few of which can be drawn."""
    address, long = server.address, f"{WORD} " * 100
    size = {"size": "32x32"} if text else {}
    odd: list[dict[str, Any]] = [
        {"prompt": WORD},
        {"prompt": long},
        {"prompt": "class:3", "negative_prompt": long},
        {"prompt": WORD * 1000},
        {"class_labels": WORD},
        {"class_labels": [WORD]},
        {"prompt": WORD, "model": WORD},
        {"prompt": WORD, "size": WORD},
        {"prompt": WORD, "user": WORD, "style": WORD},
        {"prompt": WORD, WORD: WORD},
        {"prompt": [WORD]},
        {"prompt": WORD, "n": WORD},
        {"prompt": WORD, "seed": -1},
        {"prompt": WORD, "num_inference_steps": 1},
        {"prompt": WORD, "num_inference_steps": 1000, "timeout_s": 0.05},
    ]
    asked = [draw(address, **{"num_inference_steps": 2} | size | one) for one in odd]
    return [*asked, follow(address, lambda event: None, prompt=long, partial_images=1, num_inference_steps=3, **size)]


def _malformed(server: Server) -> list[Any]:
    """Bytes that are no good request."""
    body = f'{{"prompt": "{WORD}"'.encode()
    target = f"/v1/models/{WORD}?prompt={WORD}"
    broken = [
        head("POST", PICTURES, body),
        head("POST", PICTURES, body + b"\xff}"),
        head("POST", PICTURES, body + b', "prompt": "%s"}' % WORD.encode()),
        head("POST", PICTURES, body + b" " * BODY_BYTES + b"}"),
        head("POST", PICTURES, body + b"}").replace(b"application/json", WORD.encode()),
        head("GET", target),
        head("GET", f"/{WORD}\x01"),
        head("GET", "/").replace(b"localhost", WORD.encode()),
        head("GET", "/").replace(b"Host", b"Authorization: Bearer " + WORD.encode() + b"\r\nX-" + WORD.encode() + b": a\0b\r\nHost"),
        f"{WORD} {WORD}\r\n\r\n".encode(),
    ]
    return [*(send(server, Case("word", data)) for data in broken), call(server.address, "GET", target)]


async def _leaving(server: Server, endless: dict[str, Any]) -> None:
    """A client that leaves while its picture is drawn."""
    client = asyncio.create_task(draw(server.address, **endless))
    await until(lambda: _runs(server), READY_S)
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def _killing(server: Server, endless: dict[str, Any]) -> None:
    """A request that loses its rank twice, and one like it."""
    client = asyncio.create_task(draw(server.address, **endless))
    for _ in range(2):
        await until(lambda: _runs(server), READY_S)
        os.kill((await server.rank_pids())[0], signal.SIGKILL)
        await until(lambda: _is_down(server), READY_S)
    await client
    await draw(server.address, **endless)
    await until(server.is_ready, READY_S)


async def _runs(server: Server) -> bool:
    status = await server.status()
    return status["state"] == "ready" and status["running"] > 0


async def _is_down(server: Server) -> bool:
    return not await server.is_ready()
