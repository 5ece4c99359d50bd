"""One replica of `dite serve --engine ray`: an actor of Ray Serve with a service in it, whose ranks are its own processes and no workers of Ray's.

Ray Serve runs everything here in one event loop, in a thread that ends with the process and not before. That matters: the kernel kills ranks when the
thread that started them ends. So ranks live exactly as long as the replica, however it goes.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from dite.errors import DiteError, RankLost
from dite.server.app import create_app
from dite.server.board import NAMESPACE, Stage, merged
from dite.server.logs import log
from dite.server.metrics import Metrics
from dite.server.service import Service
from dite.server.settings import ServerSettings

REPORT_S = 1.0
POLL_S = 0.02


class Front:
    """What Ray Serve takes for the app, which it copies before there is a service: hands requests on to the replica's own."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        from ray import serve

        if scope["type"] != "lifespan":
            await serve.get_replica_context().servable_object.http(scope, receive, send)
            return
        kind = ""
        while kind != "lifespan.shutdown":
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})


class SharedMetrics(Metrics):
    """Renders what all replicas have counted, as of the last report; this one's as of now."""

    def __init__(self, replica: str):
        super().__init__()
        self.replica = replica
        self.pages: dict[str, str] = {}

    def own_page(self) -> str:
        """What this replica has counted."""
        return super().render()[0].decode()

    def render(self) -> tuple[bytes, str]:
        """As of Metrics."""
        return merged(self.pages | {self.replica: self.own_page()}), super().render()[1]


class Replica:
    """`settings` lack the API key, which the board has. `threads` are those of each rank."""

    http: ASGIApp

    def __init__(self, settings: dict[str, Any], board: str, threads: int):
        import ray
        from ray import serve

        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray has set it to what all ranks have together
        self._settings = settings
        self._name = serve.get_replica_context().replica_id.unique_id
        self._board = ray.get_actor(board, namespace=NAMESPACE)
        self._service: Service | None = None
        self._drained = False
        self._tasks: list[asyncio.Task] = []

    async def check_health(self) -> None:
        """Asked by Ray: at first, before the replica gets any request, and then again and again. Raises what has ended the service."""
        if self._service is None:
            await self._begin()
        elif self._running.done() and not self._drained:
            raise RankLost("this replica has no ranks any more", str(self._running.exception() or ""))

    async def _begin(self) -> None:
        key = await self._board.key.remote()
        self._service = service = Service(ServerSettings(**self._settings, api_key=key))
        service.metrics = self._metrics = SharedMetrics(self._name)
        self.http = create_app(service)
        self._running = asyncio.create_task(self._run(service))
        while not service.is_ready and not self._running.done():
            await asyncio.sleep(POLL_S)
        if self._running.done():
            await self._running
        await self._report()
        self._tasks = [asyncio.create_task(self._keep_reporting()), asyncio.create_task(self._obey(service))]

    async def _run(self, service: Service) -> None:
        try:
            await service.run()
        except Exception as error:
            told = error.to_dict() if isinstance(error, DiteError) else {"type": type(error).__name__, "what": str(error), "why": "", "try": ""}
            log("replica_failed", replica=self._name, said=told)
            with suppress(Exception):  # the board may be gone; Ray hears of it all the same
                await self._board.failed.remote(told, getattr(error, "exit_code", 1))
            raise

    async def _report(self) -> None:
        state = "drained" if self._drained else self._service.state
        self._metrics.pages = await self._board.report.remote(self._name, state, self._metrics.own_page())

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            with suppress(Exception):  # without the board, requests are still answered
                await self._report()

    async def _obey(self, service: Service) -> None:
        """Drain when the command says so, and give up what is left when it says so again."""
        await self._board.stage_after.remote(int(Stage.SERVING))
        draining = asyncio.create_task(service.drain())
        aborting = asyncio.ensure_future(self._board.stage_after.remote(int(Stage.DRAINING)))
        await asyncio.wait({draining, aborting}, return_when=asyncio.FIRST_COMPLETED)
        service.abort()
        self._drained = True
        await _end(draining, aborting, self._running)
        await self._report()

    async def __del__(self) -> None:
        """Called by Ray Serve once, after the last answer."""
        if self._service:
            await _end(*self._tasks, self._running)


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
