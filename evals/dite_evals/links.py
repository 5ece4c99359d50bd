"""A real slow link between processes of one machine: network namespaces, joined by virtual cables whose ends hand packets on at a set rate.

    rank 0 ── veth0 [tbf] ──╮
    rank 1 ── veth0 [tbf] ──┤ bridge, in a namespace of its own, whose ports are shaped as well where there are more than two ranks
    rank 2 ── veth0 [tbf] ──╯

Everything a rank sends over TCP really waits. The token bucket is small: a large one banks credit while ranks compute, and the wire looks faster
than it is. netem would add latency too, but isn't in every kernel; so latency is what the kernel takes, some 50 µs.

Needs root, `ip` and `tc` of iproute2. All that is made lies in namespaces named after this process; so leaving, or the next run after a kill, removes
all of it, cables and processes included.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dite.errors import UnsupportedEnvironment, UsageError, did_you_mean

INTERFACE = "veth0"
PREFIX = "dite-"
CLONE_NEWNET = 0x40000000
TRANSFER_S = 1.0  # of a measured transfer


@dataclass(frozen=True)
class Rate:
    """A link of `bits_per_s` each way (None: as fast as the kernel is), through a bucket of `burst_bytes`."""

    name: str
    bits_per_s: int | None = None
    burst_bytes: int = 0


# The bucket must hold what is sent between two ticks of the kernel's clock, and a packet; more than that would be credit.
RATES = {
    rate.name: rate
    for rate in (Rate("unshaped"), Rate("1gbit", 10**9, 16 * 1024), Rate("300mbit", 3 * 10**8, 8 * 1024), Rate("100mbit", 10**8, 4 * 1024))
}


def rate_named(name: str) -> Rate:
    """Raises UsageError."""
    if name not in RATES:
        raise UsageError(f"no link {name!r}", f"there are {', '.join(RATES)}", did_you_mean(name, RATES))
    return RATES[name]


@cache
def refusal() -> str | None:
    """Why this machine can't have slow links; None where it can. Makes one and removes it again, the first time."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with Network(2) as network:
            network.shape(RATES["100mbit"])
            _run(*network.command(0, ["true"]))
    except UnsupportedEnvironment as error:
        return error.why
    return None


class Network:
    """`ranks` namespaces on one switch; a context manager. Commands of a rank are run by `command`, over links as `shape` left them."""

    def __init__(self, ranks: int):
        if not 2 <= ranks <= 64:
            raise UsageError(f"a network of {ranks} ranks", "there are 2 to 64")
        self.ranks = ranks
        self.rate = RATES["unshaped"]
        self._name = f"{PREFIX}{os.getpid()}-{_started(os.getpid())}-{id(self):x}"

    def __enter__(self) -> Network:
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in [one for one in _namespaces() if one.startswith(self._name + "-")]:
            _remove(namespace)

    def namespace(self, rank: int) -> str:
        return f"{self._name}-{rank}"

    def address(self, rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def command(self, rank: int, words: Sequence[str]) -> list[str]:
        """The command that runs `words` where that rank's link is. `ip` becomes it, so that its process id is that of `words`."""
        return ["ip", "netns", "exec", self.namespace(rank), *words]

    def shape(self, rate: Rate) -> None:
        """All links have this rate from now on."""
        ends = [(self.namespace(rank), INTERFACE) for rank in range(self.ranks)]
        if self.ranks > 2:  # what several send to one must queue, too
            ends += [(self._switch, f"port{rank}") for rank in range(self.ranks)]
        for namespace, interface in ends:
            if self.rate.bits_per_s is not None:
                _run("tc", "-n", namespace, "qdisc", "del", "dev", interface, "root")
            if rate.bits_per_s is not None:
                bucket = ("rate", f"{rate.bits_per_s}bit", "burst", str(rate.burst_bytes), "latency", "200ms")
                _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)
        self.rate = rate

    def measured_bytes_per_s(self, seconds: float = TRANSFER_S) -> float:
        """What a plain TCP connection from rank 1 to rank 0 carries."""
        with (
            self._inside(0, lambda: socket.create_server((self.address(0), 0))) as server,
            self._inside(1, lambda: socket.create_connection(server.getsockname())) as sender,
            server.accept()[0] as receiver,
            ThreadPoolExecutor(1) as other,
        ):
            sent = other.submit(_send, sender, seconds)
            received = len(receiver.recv(1))  # the connection is warm: count from here
            begin = time.perf_counter()
            while part := receiver.recv(2**18):
                received += len(part)
            took = time.perf_counter() - begin
            sent.result()
        return received / took

    def _inside(self, rank: int, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket of that rank's namespace: namespaces belong to threads, and sockets stay where they were made."""

        def made() -> socket.socket:
            with open(f"/run/netns/{self.namespace(rank)}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise UnsupportedEnvironment("no slow link can be made here", os.strerror(ctypes.get_errno()))
            return make()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(made).result(30)

    @property
    def _switch(self) -> str:
        return f"{self._name}-s"

    def _build(self) -> None:
        for namespace in (self._switch, *map(self.namespace, range(self.ranks))):
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", self._switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge0", "up")
        for rank in range(self.ranks):
            own, port = self.namespace(rank), f"port{rank}"
            _run("ip", "-n", own, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", self._switch)
            _run("ip", "-n", own, "addr", "add", f"{self.address(rank)}/24", "dev", INTERFACE)
            _run("ip", "-n", own, "link", "set", INTERFACE, "up")
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge0", "up")


def remove_stale() -> list[str]:
    """Remove what killed runs left behind, their processes too; returns the names."""
    stale = []
    for namespace in _namespaces():
        words = namespace.removeprefix(PREFIX).split("-")
        if namespace.startswith(PREFIX) and len(words) == 4 and words[0].isdigit() and _started(int(words[0])) != words[1]:
            _remove(namespace)
            stale.append(namespace)
    return stale


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


def _remove(namespace: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    for pid in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _started(pid: int) -> str:
    """When a process started, in ticks; "" if there is none. Tells a process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _run(*words: str, timeout_s: float = 30.0) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedEnvironment("no slow link can be made here", str(error)) from error
    if done.returncode:
        raise UnsupportedEnvironment("no slow link can be made here", f"{' '.join(words[:6])}: {done.stderr.strip() or done.returncode}")


def _send(connection: socket.socket, seconds: float) -> None:
    until, part = time.perf_counter() + seconds, bytes(2**16)
    while time.perf_counter() < until:
        connection.sendall(part)
    connection.shutdown(socket.SHUT_WR)
