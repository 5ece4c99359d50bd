"""A Ray to run on: one that is there already, or one of our own that ends with this process."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from dite.errors import UnsupportedEnvironment, UsageError
from dite.server.settings import ServerSettings

APPLICATION = "dite"  # its name on Ray Serve
REACH_S = 5.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # every line of a replica's log counts
    "RAY_COLOR_PREFIX": "0",
    "RAY_worker_niceness": "0",  # replicas hand theirs on to their ranks, which do the work
}


def prepare() -> None:
    """Set what Ray reads from the environment when it is imported. What is set already stays."""
    alone = {
        "RAY_AUTH_MODE": "token",  # whoever may talk to Ray may run anything
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there, Ray then uses the loopback address and listens on no other
    }
    for name, value in (ENVIRONMENT | ({} if os.environ.get("RAY_ADDRESS") else alone)).items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Share:
    """What a replica takes of its machine: `threads` for each of its ranks, and a card for each on cuda."""

    replicas: int
    threads: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, settings: ServerSettings, replicas: int) -> Share:
        """As many threads as OMP_NUM_THREADS says; else one on a cluster or on cuda, and an even share of a machine that nobody else uses."""
        on_cuda, wanted = settings.device.startswith("cuda"), os.environ.get("OMP_NUM_THREADS", "")
        fair = 1 if on_cuda or os.environ.get("RAY_ADDRESS") else (os.cpu_count() or 1) // (replicas * settings.nproc)
        threads = max(1, int(wanted) if wanted.isdigit() else fair)
        return cls(replicas, threads, threads * settings.nproc, settings.nproc if on_cuda else 0)


@dataclass(frozen=True)
class Cluster:
    """A Ray that was joined or started here, and whether Ray Serve ran on it before."""

    share: Share
    joined: bool
    serving: bool

    def end_server(self) -> None:
        """End what was started on a cluster that goes on."""
        from ray import serve

        if self.serving:
            with suppress(Exception):  # somebody may have ended it
                serve.delete(APPLICATION)
        elif self.joined:
            serve.shutdown()


@contextmanager
def connected(share: Share) -> Iterator[Cluster]:
    """Join the cluster at RAY_ADDRESS, or start one. Raises UnsupportedEnvironment when there is none, or no room; UsageError when it is taken."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        _reach(address)
    import ray

    options: dict[str, Any] = {"namespace": APPLICATION, "logging_level": logging.WARNING}
    if not address:  # more ranks than cores are slow, and no mistake
        options |= {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, share.replicas * share.cpus)}
    try:
        ray.init(address or "local", **options)
    except Exception as error:  # Ray raises plain ones, too
        if address:
            hint = "see `ray status`; a cluster with tokens needs RAY_AUTH_MODE=token"
            raise UnsupportedEnvironment(f"can't join the Ray cluster at {address}", gist(error), hint) from error
        raise UnsupportedEnvironment("can't start Ray on this machine", gist(error)) from error
    try:
        cluster = _look_around(share, address)
        try:
            yield cluster
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # half of what follows would leave processes
            cluster.end_server()
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ray itself would try for ten minutes."""
    if "://" in address:
        raise UsageError(f"RAY_ADDRESS is {address}", "dite serve runs on a machine of the cluster, not as a client of it", "HOST:PORT, or auto")
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        except OSError as error:
            why = error.strerror or str(error)
            raise UnsupportedEnvironment(f"no Ray cluster answers at {address}", why, "unset RAY_ADDRESS to start one on this machine") from error


def _look_around(share: Share, address: str) -> Cluster:
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    status = serve.status() if address else None
    if status and APPLICATION in status.applications:
        hint = "end that one first, or wait until it has ended"
        raise UsageError(f"a server runs on the Ray cluster at {address}", "a cluster has room for one", hint)
    found, needed = int(ray.cluster_resources().get("GPU", 0)), share.replicas * share.gpus
    if found < needed and not address:  # a cluster may grow
        rule = f"one for each rank; Ray finds {found} here"
        raise UnsupportedEnvironment(f"--replicas {share.replicas} needs {needed} cards", rule, "ask for fewer replicas or ranks")
    return Cluster(share, bool(address), bool(status and status.proxies))


def gist(error: BaseException) -> str:
    """What it says in one line; of the tracebacks that Ray quotes, the last one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if any(line.startswith("  File ") for line in lines) else 0].strip()[:500]
