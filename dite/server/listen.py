"""Running a server in this process: the socket, the signals, and the order in which things end."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dite.errors import DiteError, UnsupportedEnvironment, UsageError
from dite.server.settings import ServerSettings

GRACE_S = 5.0  # for answers that are on their way when everything else has ended; those of an orderly end get what is left of drain_timeout_s
BACKLOG = 2048
POLL_S = 0.02

Started = Callable[[str], None]


def serve(model: str | Path, *, api_key: str | None = None, **options: Any) -> None:
    """Serve a model until SIGTERM or Ctrl-C: `dite.serve("dit-w4a8", port=8000, nproc=2, mode="kv_gather", codec="int4")`.

    `options` are those of dite.server.settings.ServerSettings. Returns when everything accepted has been answered. Raises UsageError for settings
    that can't be, DiteError when the model can't be loaded or its ranks keep dying.
    """
    from dite.recipe import validate

    run(validate(ServerSettings, {"model": str(model), "api_key": api_key, **options}, "server"))


def run(settings: ServerSettings, started: Started | None = None) -> None:
    """The same with settings at hand; `started(url)` is called once the server is ready."""
    try:
        import fastapi  # noqa: F401
        import greenlet  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedEnvironment(
            f"{error.name} is not installed", "the server needs what the extra `serve` brings", 'pip install "dite[serve]"'
        ) from error
    with bind(settings) as listening:
        _allow_files(2 * settings.limits.connections + 256)
        asyncio.run(Listening(settings, listening, started).run())


def _allow_files(count: int) -> None:
    """A connection is a file; with too few of them, accepting one fails and nobody is told."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def bind(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket that listens where the settings say. Raises UsageError when somebody else does."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((settings.host, settings.port))
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(
                f"can't listen on {settings.host} port {settings.port}", why, "choose another --port, or 0 for any that is free"
            ) from error
        listening.listen(BACKLOG)
        listening.setblocking(False)
        yield listening


class Listening:
    """One run: HTTP and ranks side by side, until a signal or an error."""

    def __init__(self, settings: ServerSettings, listening: socket.socket, started: Started | None):
        self.settings, self.socket, self.started = settings, listening, started
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run(self) -> None:
        """Returns after an orderly end."""
        from dite.server.app import create_app
        from dite.server.logs import adopt, log
        from dite.server.service import Service

        adopt("uvicorn", "uvicorn.error", "asyncio")
        service = Service(self.settings)
        server = _http(create_app(service), service)
        stop, abort = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def signalled() -> None:
            if stop.is_set():
                abort.set()
            service.close_doors()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signalled)
        http = asyncio.create_task(server.serve(sockets=[self.socket]))
        ranks = asyncio.create_task(service.run())
        ready = asyncio.create_task(self._announce(service))
        waiting = asyncio.create_task(stop.wait())
        log("listening", url=self.url, model=self.settings.served_name)
        try:
            await asyncio.wait({ranks, waiting, http}, return_when=asyncio.FIRST_COMPLETED)
            drained, until = True, loop.time() + GRACE_S
            if waiting.done() and not ranks.done():
                until = max(until, loop.time() + self.settings.drain_timeout_s)
                drained = await _first(service.drain(), abort.wait(), ranks) is not False
            service.abort()
            # Everything has its end; now clients read it, at their own pace. Slow ones are dropped after send_timeout_s, as ever.
            await _first(_answered(server, until), abort.wait(), ranks)
        finally:
            ready.cancel()
            waiting.cancel()
            server.should_exit = True
            await asyncio.wait({http}, timeout=2 * GRACE_S)
            ended = [task for task in (ranks, http) if task.done() and not task.cancelled()]
            error = next((task.exception() for task in ended if task.exception() is not None), None)
            ranks.cancel()
            await asyncio.wait({ranks}, timeout=2 * GRACE_S)
            log("stopped", error=None if error is None else str(error))
        if error is not None:
            raise error
        if abort.is_set():
            raise DiteError("the server was stopped by a second signal", "requests under way were answered with 503", "one SIGTERM lets them finish")
        if not drained:
            rule = f"drain_timeout_s is {self.settings.drain_timeout_s:g}, and those that took longer were answered with 503"
            raise DiteError("the server was stopped before everything it had accepted was drawn", rule, "allow more, or accept less (--max-queue)")

    async def _announce(self, service: Any) -> None:
        while not service.is_ready:
            await asyncio.sleep(0.02)
        if self.started:
            self.started(self.url)


async def _first(*awaitables: Any) -> Any:
    """Wait for one of them; the result of the first of all, None where it isn't done."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[:-1]:  # the last one is somebody else's
        task.cancel()
    return tasks[0].result() if tasks[0].done() and not tasks[0].cancelled() else None


async def _answered(server: Any, until: float) -> None:
    """Until no connection has an answer on its way, or it is too late. New requests are still answered: with 503."""
    clock = asyncio.get_running_loop().time
    while any(one.is_answering for one in server.server_state.connections) and clock() < until:
        await asyncio.sleep(POLL_S)


def _http(app: Any, service: Any) -> Any:
    import uvicorn

    from dite.server.guard import guarded_protocol

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are ours: uvicorn would stop listening at once, and nobody could see that the server is draining."""
            yield

    config = uvicorn.Config(
        app,
        http=guarded_protocol(service.settings.limits, service.metrics),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE_S),
    )
    return Server(config)
