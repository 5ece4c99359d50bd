"""Answers that take their time: work that ends when its client leaves, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dite.server.answers import CLIENT_LEFT, client_left, mistake
from dite.server.edge import Trace
from dite.server.job import Event, Pictures
from dite.server.logs import failure, log
from dite.server.problems import Problem

PAUSE_S = 15.0  # proxies close connections on which nothing is said for longer
Result = TypeVar("Result")


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Where the client leaves first, `work` is cancelled, and Problem 499 raised. The request's body must have been read."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_left()
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises Problem 504 when it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise Problem(504, "deadline_exceeded", f"no picture after {seconds:g} s", retry=False) from None


class EventStream(Response):
    """A job's events as `text/event-stream`, which it closes. `told` puts an event into the documents that are sent for it, each with a `type`.

    The headers wait for the first event, or for the first pause: a job that fails at once is answered with the status of its failure. Later failures
    are sent as an event `error`, in the shape that OpenAI's clients raise.
    """

    def __init__(self, events: AsyncGenerator[Event, None], told: Callable[[Event], Iterator[dict[str, Any]]], allowed_s: float):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.told, self.allowed_s = events, told, allowed_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises Problem while nothing has been sent."""
        trace = Trace.of(scope)
        try:
            await unless_left(receive, within(self.allowed_s, self._deliver(trace, send)))
        except Exception as error:
            problem = error if isinstance(error, Problem) else mistake(trace.id)
            if problem is not error:
                log("mistake", request=trace.id, job=trace.job, **failure(error))
            if not trace.begun:
                raise problem from None
            trace.status = problem.status
            if problem.status == CLIENT_LEFT:
                return
            await _say(send, _event("error", {"type": "error"} | problem.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _deliver(self, trace: Trace, send: Send) -> None:
        async with aclosing(with_pauses(self.events, PAUSE_S)) as events:
            async for event in events:
                if isinstance(event, Problem):
                    raise event
                if not trace.begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if event is None:
                    await _say(send, b": still here\n\n")
                    continue
                for document in self.told(event):
                    await _say(send, _event(document["type"], document))


async def with_pauses(events: AsyncGenerator[Event, None], every_s: float) -> AsyncGenerator[Event | None, None]:
    """A job's events, and None wherever none came for `every_s`.

    No event is lost: waiting for one goes on through a pause, where `asyncio.wait_for` would have ended the iterator.
    """
    following: asyncio.Future[Event] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=every_s)
            if not done:
                yield None
                continue
            event, following = following.result(), None
            yield event
            if isinstance(event, Pictures | Problem):
                return
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await events.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(send: Send, text: bytes) -> None:
    await send({"type": "http.response.body", "body": text, "more_body": True})


def _event(name: str, document: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(document, separators=(',', ':'))}\n\n".encode("ascii")
