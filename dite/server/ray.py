"""`dite serve --engine ray`: replicas on a Ray cluster behind one address, for as long as this command runs.

Ray Serve makes the replicas, spreads requests over them and replaces those that die; each is a service with ranks of its own (dite.server.replica).
Whoever has no cluster needs none of this: several `dite serve` behind any balancer do the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dite.errors import DiteError, RankLost, UnsupportedEnvironment, UsageError
from dite.server.board import Roll
from dite.server.cluster import APPLICATION, Cluster, Share, connected, gist, prepare
from dite.server.listen import bind
from dite.server.logs import log
from dite.server.settings import ServerSettings
from dite.server.supervisor import StartFailed

POLL_S = 0.1
LOOK_S = 30.0  # the board answers in milliseconds; one on a cluster that is gone never does
HEALTH_S = 0.5  # between Ray's questions: a replica whose third answer is bad is replaced
SCHEDULE_S = 60.0  # for Ray to find room for the replicas
PROBE_S = 30.0  # for Ray's proxy to know of replicas that are ready
LINGER_S = 2.0  # for the last answers to pass Ray's proxy, which ends without waiting for them
MARGIN_S = 10.0

Started = Callable[[str], None]


def serve_on_ray(settings: ServerSettings, replicas: int, started: Started) -> None:
    """Serve until SIGTERM or Ctrl-C, on the cluster at RAY_ADDRESS or on a new one of this machine; `started(url)` once every replica is ready.

    Returns when everything accepted has been answered. What was started here is ended here; a cluster that was joined goes on. Raises StartFailed, in
    a rank's own words, when a first replica can't be made, and RankLost when the cluster is lost.
    """
    prepare()
    try:
        import fastapi  # noqa: F401
        import greenlet  # noqa: F401
        import prometheus_client  # noqa: F401
        from ray import serve  # noqa: F401
    except ImportError as error:
        missing = f"{error.name} is not installed"
        raise UnsupportedEnvironment(
            missing, "--engine ray needs what the extras `ray` and `serve` bring", 'pip install "dite[ray,serve]"'
        ) from error
    if settings.device.startswith("cuda:"):
        raise UsageError(f"--device {settings.device} with --engine ray", "Ray gives every replica cards of its own", "use --device cuda")
    if not os.environ.get("RAY_ADDRESS"):
        free_port(settings)  # else it is said only after Ray's start
    with connected(Share.of(settings, replicas)) as cluster:
        asyncio.run(Deployment(settings, replicas, cluster).run(started))


def free_port(settings: ServerSettings) -> int:
    """The port to listen on. Raises UsageError when it is taken, which Ray's proxy would not notice: it shares ports."""
    with bind(settings) as listening:
        return listening.getsockname()[1]


class Deployment:
    """The replicas of one command."""

    def __init__(self, settings: ServerSettings, replicas: int, cluster: Cluster):
        self.settings, self.replicas, self.cluster = settings, replicas, cluster
        self.board: Any = None
        self.stop, self.abort = asyncio.Event(), asyncio.Event()
        self.roll = Roll()

    async def run(self, started: Started) -> None:
        """Until a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        port = self.settings.port if self.cluster.serving else free_port(self.settings)
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        await asyncio.to_thread(self._deploy, await self._put_up_board(), port)
        await self._until_ready(port)
        if not self.stop.is_set():
            log("listening", url=f"http://{host}:{port}", model=self.settings.served_name, replicas=self.replicas)
            started(f"http://{host}:{port}")
            await self._watch()
        await self._drain()
        log("stopped")
        if self.abort.is_set():
            raise DiteError("the server was stopped by a second signal", "requests under way were answered with 503", "one SIGTERM lets them finish")

    def _signalled(self) -> None:
        (self.abort if self.stop.is_set() else self.stop).set()

    async def _put_up_board(self) -> str:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from dite.server.board import NAMESPACE, Board

        name = f"board-{uuid.uuid4().hex}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(Board).options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here).remote()
        key = self.settings.api_key
        await self.board.set_key.remote(key.get_secret_value() if key else None)
        return name

    def _deploy(self, board: str, port: int) -> None:
        """Hand the replicas over to Ray Serve. Raises StartFailed when it refuses them."""
        from ray import serve

        from dite.server.replica import Front, Replica

        settings, share = self.settings, self.cluster.share
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        deployment = serve.deployment(
            name="replica",
            num_replicas=self.replicas,
            ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
            max_ongoing_requests=settings.limits.connections,  # replicas say themselves when it is too much
            graceful_shutdown_timeout_s=settings.drain_timeout_s,
            graceful_shutdown_wait_loop_s=0.2,
            health_check_period_s=HEALTH_S,
            health_check_timeout_s=10.0,
        )(serve.ingress(Front())(Replica))
        replicas = deployment.bind(self._values(), board, share.threads)
        try:
            where = "EveryNode" if self.cluster.joined else "HeadOnly"
            serve.start(proxy_location=where, http_options={"host": settings.host, "port": port}, logging_config=quiet)
            serve.run_many([serve.RunTarget(replicas, APPLICATION, "/", quiet)], wait_for_applications_running=False)
        except Exception as error:
            raise StartFailed("Ray Serve refuses the replicas", gist(error), "look at the log above") from error

    def _values(self) -> dict[str, Any]:
        """The settings as replicas get them: without the key, and with paths that mean the same in every process."""
        values = self.settings.model_dump(mode="json", exclude={"api_key"}) | {"name": self.settings.served_name}
        for field in ("model", "codec"):
            if (path := Path(values[field])).exists():
                values[field] = str(path.resolve())
        return values

    async def _look(self) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self.board.look.remote(), LOOK_S)
        except Exception as error:
            raise RankLost("the Ray cluster is lost", gist(error), "start the server again") from error

    async def _until_ready(self, port: int) -> None:
        """Returns early when the command is told to stop. Raises StartFailed."""
        limit_s = self.settings.startup_timeout_s + SCHEDULE_S
        deadline, ready, asked_s = time.monotonic() + limit_s, 0, 0.0
        while not self.stop.is_set() and ready < self.replicas:
            seen = await self._look()
            ready = list(seen["states"].values()).count("ready")
            if seen["failure"]:
                failed = StartFailed(seen["failure"]["what"], seen["failure"]["why"], seen["failure"]["try"])
                failed.exit_code = seen["failure"]["exit_code"]
                raise failed
            if (now := time.monotonic()) > asked_s + 1.0:
                asked_s = now
                if (refused := await asyncio.to_thread(_refused)) is not None:
                    raise StartFailed("Ray Serve could not make the replicas", refused, "look at the log above")
            if now > deadline:
                rule = f"each needs {self.cluster.share.cpus} CPUs and {self.cluster.share.gpus} GPUs of one machine"
                raise StartFailed(f"{ready} of {self.replicas} replicas are ready after {limit_s:g} s", rule, "see `ray status`, or ask for fewer")
            await asyncio.sleep(POLL_S)
        deadline = time.monotonic() + PROBE_S
        while not self.stop.is_set() and not await asyncio.to_thread(self._answers, port):
            if time.monotonic() > deadline:
                why = "Ray Serve may have been started before, at another port" if self.cluster.serving else "its proxy may run on another machine"
                raise StartFailed(f"the replicas are ready, but nothing answers at port {port}", why, "run this command on the cluster's head")
            await asyncio.sleep(POLL_S)

    def _answers(self, port: int) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        address = f"[{host}]" if ":" in host else host
        with suppress(OSError, ValueError), urllib.request.urlopen(f"http://{address}:{port}/ready", timeout=5) as answer:
            return json.load(answer) == {"status": "ready"}
        return False

    async def _watch(self) -> None:
        """Until a signal. Raises RankLost."""
        ready = self.replicas
        while not self.stop.is_set():
            states = (await self._look())["states"]
            self.roll = Roll()  # of those before, Ray may have replaced some
            self.roll.hear(states, time.monotonic())
            before, ready = ready, list(states.values()).count("ready")
            if ready != before:
                log("replicas", ready=ready, of=self.replicas)
            if not ready and not await asyncio.to_thread(_deployed):
                raise RankLost("the server has been taken off its Ray cluster", "its application was deleted by somebody else")
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), 1.0)

    async def _drain(self) -> None:
        """Replicas refuse what is new from now on, and answer what they have accepted."""
        from dite.server.board import Stage

        log("draining")
        await self.board.go_on_to.remote(int(Stage.DRAINING))
        deadline, told = time.monotonic() + self.settings.drain_timeout_s + MARGIN_S, False
        while time.monotonic() < deadline:
            self.roll.hear((await self._look())["states"], time.monotonic())
            if self.roll.is_over(time.monotonic()):
                break
            if self.abort.is_set() and not told:
                told = True
                await self.board.go_on_to.remote(int(Stage.ABORTING))
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(LINGER_S)


def _refused() -> str | None:
    """Why Ray Serve has given up, if it has. What fails in a replica itself is known before."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    return application.message.strip().splitlines()[-1] if application and application.status == "DEPLOY_FAILED" else None


def _deployed() -> bool:
    from ray import serve

    return APPLICATION in serve.status().applications
