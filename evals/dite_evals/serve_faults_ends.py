"""A server's end as the fault: told to stop while it is busy, killed, and not alone on its host. See dite_evals.serve_faults."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dite_evals.serve_replies import Tally, read, rounded, verdict
from dite_evals.serving import READY_S, Answer, Server, alive, call, children, draw, follow, launched, percentile, served, until

THREADS = 1  # of a rank
CLIENTS = 12
BUSY = ("--max-batch", "4", "--max-queue", "8")
WAITING = 4  # clients when it is told twice
END_S = 150.0  # ranks that have died just before are started once more


@dataclass
class Crowd:
    """Clients that always want more, every third as a stream; whatever happens to the server, each notes what came of its requests and when."""

    server: Server
    answers: list[tuple[float, Answer]] = field(default_factory=list)  # when it was asked for, and the reply
    gone: bool = False

    async def run(self) -> None:
        """Until `gone` is set."""
        await asyncio.gather(*(self._client(number) for number in range(CLIENTS)))

    async def _client(self, number: int) -> None:
        chance = random.Random(number)
        while not self.gone:
            asked_s, wanted = time.monotonic(), {"seed": number, "num_inference_steps": chance.choice((5, 10, 20))}
            if number % 3:
                answer = await draw(self.server.address, END_S, **wanted)
            else:
                answer = await follow(self.server.address, lambda event: None, END_S, **wanted)
            self.answers.append((asked_s, answer))
            await asyncio.sleep(0.02 if answer.status == 200 else 0.1)


async def told_to_stop(count: int, model: str) -> dict[str, Any]:
    """SIGTERM under load, `count` times; every fifth time a rank was killed a moment before."""
    tally, unready_s, ended_s, codes, orphans, turned_away = Tally(), [], [], [], 0, 0
    for number in range(count):
        with served(model, *BUSY, threads=THREADS) as server:
            one = await stop_of(server, random.Random(number).uniform(0.2, 1.5), tally, killed=number % 5 == 4)
        if number % 5 != 4:  # else it has said so before
            unready_s.append(one.unready_s)
            ended_s.append(one.ended_s)
        codes.append(one.exit_code)
        orphans += one.orphans
        turned_away += one.turned_away
    checks = {
        "nothing lost": not tally.lost,
        "pictures, 429 and 503 only": all(name == "pictures" or name[:3] in ("429", "503") for name in tally.outcomes),
        "/ready says so in time": max(unready_s) <= 0.1,
        "exit code 0": set(codes) == {0},
        "no orphans": orphans == 0,
    }
    return verdict(
        "0 lost, /ready 503 within 100 ms, exit code 0, 0 orphans",
        count,
        len(tally.lost) + sum(code != 0 for code in codes) + orphans,
        checks,
        **tally.row(),
        turned_away_afterwards=turned_away,
        unready_s={"p50": rounded(percentile(unready_s, 0.5)), "p99": rounded(percentile(unready_s, 0.99)), "most": rounded(max(unready_s))},
        ended_s={"p50": rounded(percentile(ended_s, 0.5)), "most": rounded(max(ended_s))},
        exit_codes=sorted(set(map(str, codes))),
        orphans=orphans,
    )


@dataclass(frozen=True)
class Stopped:
    """How a server ended: seconds from SIGTERM until it said so, and until it was gone. Connections made after SIGTERM may have found nobody."""

    unready_s: float
    ended_s: float
    exit_code: int | None
    orphans: int
    turned_away: int


async def stop_of(server: Server, after_s: float, tally: Tally, killed: bool = False) -> Stopped:
    """SIGTERM to a server under load, one of whose ranks has just been `killed`; replies are counted in `tally`."""
    pids, crowd = [*await server.rank_pids(), *children(server.process.pid)], Crowd(server)
    running = asyncio.create_task(crowd.run())
    await asyncio.sleep(after_s)
    if killed:
        os.kill(pids[0], signal.SIGKILL)
    server.process.send_signal(signal.SIGTERM)
    signalled_s = time.monotonic()
    unready_s = await until(lambda: _says_503(server), 10)
    with suppress(TimeoutError):
        await until(lambda: server.process.poll() is not None, END_S)
    ended_s = time.monotonic() - signalled_s
    crowd.gone = True
    await running
    turned_away = 0
    for asked_s, answer in crowd.answers:
        if answer.status == 0 and not answer.begun and asked_s > signalled_s and answer.seconds < END_S / 2:
            turned_away += 1
        else:
            tally.count(answer)
    return Stopped(unready_s, ended_s, server.process.poll(), sum(map(alive, set(pids))), turned_away)


async def _says_503(server: Server) -> bool:
    return (await call(server.address, "GET", "/ready")).status in (503, 0)


async def told_twice(count: int, model: str) -> dict[str, Any]:
    """A second SIGTERM while requests are finished after the first, `count` times."""
    tally, ended_s, codes, orphans = Tally(), [], [], 0
    for _ in range(count):
        with served(model, "--max-batch", "2", "--set", "limits.steps=1000", threads=THREADS) as server:
            one = await abort_of(server, tally)
        ended_s.append(one.ended_s)
        codes.append(one.exit_code)
        orphans += one.orphans
    checks = {
        "ends at once": max(ended_s) <= 5.0,
        "with an error": all(code not in (0, None) for code in codes),
        "everyone told so": tally.outcomes == {"503 shutting_down": WAITING * count},
        "no orphans": orphans == 0,
    }
    return verdict(
        "ends within 5 s with exit code ≠ 0, everyone who waits is told so, 0 orphans",
        count,
        len(tally.lost) + orphans,
        checks,
        **tally.row(),
        exit_codes=codes,
        ended_s={"p50": rounded(percentile(ended_s, 0.5)), "most": rounded(max(ended_s))},
        orphans=orphans,
    )


async def abort_of(server: Server, tally: Tally) -> Stopped:
    """The same of a server with up to 1000 steps, which ends it; WAITING replies are counted in `tally`."""
    pids = await server.rank_pids()
    clients = [asyncio.create_task(draw(server.address, seed=seed, num_inference_steps=900)) for seed in range(WAITING)]
    await until(lambda: _is_running(server), READY_S)
    server.process.send_signal(signal.SIGTERM)
    unready_s = await until(lambda: _says_503(server), 10)
    await asyncio.sleep(0.3)
    still = server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    with suppress(TimeoutError):
        await until(lambda: server.process.poll() is not None, END_S)
    ended_s = time.monotonic() - began
    for client in clients:
        tally.count(await client)
    return Stopped(unready_s, ended_s, server.process.poll() if still else 0, sum(map(alive, pids)), 0)


async def _is_running(server: Server) -> bool:
    return (await server.status())["running"] > 0


ORPHANED_S = 5.0


async def supervisor_killed(count: int, model: str) -> dict[str, Any]:
    """SIGKILL to the server itself, `count` times: one rank or two are in the middle of a picture, or (every third time) still starting."""
    orphans, gone_s, started = 0, [], 0
    for number in range(count):
        ranks = 1 + number % 2
        flags = ("--nproc", str(ranks), "--codec", "int4")
        if number % 3 == 2:
            with launched(model, *flags, threads=THREADS) as (process, _):
                await until(lambda: len(children(process.pid)) == ranks, READY_S, every_s=0.02)  # noqa: B023
                await asyncio.sleep(random.Random(number).uniform(0.0, 3.0))
                pids = children(process.pid)
                process.kill()
                seconds, left = await _outlived(pids)
        else:
            with served(model, *flags, threads=THREADS) as server:
                seconds, left = await kill_of(server)
        started += ranks
        orphans += left
        gone_s.append(seconds)
    checks = {"no orphans": orphans == 0}
    return verdict(
        f"0 orphans after {ORPHANED_S:g} s",
        count,
        orphans,
        checks,
        ranks=started,
        orphans=orphans,
        ranks_gone_s={"p50": rounded(percentile(gone_s, 0.5)), "most": rounded(max(gone_s))},
    )


async def kill_of(server: Server) -> tuple[float, int]:
    """SIGKILL to a server in the middle of a picture: how long its ranks outlive it, and how many do for ORPHANED_S."""
    pids = await server.rank_pids()
    client = asyncio.create_task(draw(server.address, num_inference_steps=250))
    await until(lambda: _is_running(server), READY_S)
    server.process.kill()
    outlived = await _outlived(pids)
    await client
    return outlived


async def _outlived(pids: list[int]) -> tuple[float, int]:
    began = time.monotonic()
    with suppress(TimeoutError):
        await until(lambda: not any(map(alive, pids)), ORPHANED_S)
    seconds, left = time.monotonic() - began, [pid for pid in pids if alive(pid)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return seconds, len(left)


async def two_servers(count: int, model: str) -> dict[str, Any]:
    """Two servers on one host, two ranks each, asked for `count` pictures at once; and a third that wants the port of the first."""
    flags = ("--nproc", "2", "--codec", "int4")
    with served(model, *flags, threads=THREADS) as first, served(model, *flags, threads=THREADS) as second:
        return await neighbours_of(first, second, count, model)


async def neighbours_of(first: Server, second: Server, count: int, model: str) -> dict[str, Any]:
    """The same of two servers of `model` whose pictures don't depend on what is drawn beside them."""
    tally, other = Tally(), 0
    for seed in range(count):
        answers = await asyncio.gather(*(draw(server.address, seed=seed) for server in (first, second)))
        replies = [tally.count(answer) for answer in answers]
        other += replies[0].pictures != replies[1].pictures
    command = [sys.executable, "-m", "dite", "serve", model, "--port", str(first.address[1]), "--json"]
    refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    still = read(await draw(first.address))
    clear = f"port {first.address[1]}" in refused.stdout and "in use" in refused.stdout.lower() and "--port" in refused.stdout
    checks = {
        "both draw": tally.outcomes == {"pictures": 2 * count},
        "the same pictures": other == 0,
        "the taken port refused": refused.returncode == 2 and clear and still.drawn,
    }
    goal = "both answer with the same pictures; a port that is taken is refused with exit code 2 and an error that names it"
    return verdict(goal, count, len(tally.lost) + other, checks, **tally.row(), other_pictures=other, refused_exit_code=refused.returncode)
