"""A server's ranks as the fault: killed, stopped, killed again and again, drawing NaN, out of memory. See dite_evals.serve_faults."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from dite_evals.serve_models import BROKEN, break_class
from dite_evals.serve_replies import Reply, Tally, is_black, rounded, verdict
from dite_evals.serving import READY_S, Answer, Server, alive, children, draw, follow, percentile, served, until

THREADS = 1  # of a rank
STEPS = 40
HEARTBEAT_S = 2.0
# With a fixed number of rows in a forward a picture has the same bits whatever is drawn beside it, so that the same can be asked of one drawn again.
LASTING = ("--max-batch", "2", "--micro-batch", "2", "--set", "max_restarts=1000")
STOPPABLE = (*LASTING, "--set", f"heartbeat_timeout_s={HEARTBEAT_S}")
SHARED = ("--max-batch", "2", "--nproc", "2", "--codec", "int4", "--set", "max_restarts=1000")


async def rank_killed(count: int, model: str) -> dict[str, Any]:
    """SIGKILL to the rank in the middle of a picture, `count` times."""
    with served(model, *LASTING, threads=THREADS) as server:
        return await interrupted(server, count, signal.SIGKILL)


async def one_of_two_ranks_killed(count: int, model: str) -> dict[str, Any]:
    """The same where two ranks share a picture and remember what they exchanged."""
    with served(model, *SHARED, threads=THREADS) as server:
        return await interrupted(server, count, signal.SIGKILL)


async def rank_stopped(count: int, model: str) -> dict[str, Any]:
    """SIGSTOP to the rank in the middle of a picture, `count` times."""
    with served(model, *STOPPABLE, threads=THREADS) as server:
        return await interrupted(server, count, signal.SIGSTOP)


async def interrupted(server: Server, count: int, how: signal.Signals) -> dict[str, Any]:
    """The same of a server with the settings LASTING, STOPPABLE or SHARED: three clients, one of whom waits, and a signal to one rank. Every fifth
    time those that are started in its place are killed as well."""
    chance, tally, noticed_s, again_s, starting = random.Random(0), Tally(), [], [], 0
    calm = [_only(tally.count(await draw(server.address, seed=seed, num_inference_steps=STEPS))) for seed in range(3)]
    before, others, left = (await server.status())["restarts"], 0, 0
    for number in range(count):
        async with _drawing(server, chance.randrange(1, STEPS // 2)) as clients:
            pids = await server.rank_pids()
            os.kill(chance.choice(pids), how)
            noticed_s.append(await until(lambda: _is_down(server), 60))
            if number % 5 == 4:
                starting += await _kill_starting(server, chance.uniform(0.2, 2.0))
            again_s.append(await until(server.is_ready, READY_S))
        drawn = [tally.count(client.result()) for client in clients]
        others += sum(_only(reply) != picture for reply, picture in zip(drawn, calm, strict=True))
        left += sum(alive(pid) for pid in pids)
    restarts = (await server.status())["restarts"] - before
    limit = 1.0 + (HEARTBEAT_S if how == signal.SIGSTOP else 0.0)
    checks = {
        "nothing lost": not tally.lost,
        "every picture drawn": tally.outcomes == {"pictures": 3 * count + 3},
        "the same pictures": others == 0,
        "noticed in time": max(noticed_s) <= limit,
        "no rank left behind": left == 0,
        "no other restarts": restarts == count + starting,
    }
    return verdict(
        f"0 lost, the same pictures, noticed within {limit:g} s",
        count,
        len(tally.lost) + others,
        checks,
        **tally.row(),
        signal=how.name,
        ranks=len(pids),
        other_pictures=others,
        killed_while_starting=starting,
        restarts=restarts,
        noticed_s={"p50": rounded(percentile(noticed_s, 0.5)), "p99": rounded(percentile(noticed_s, 0.99)), "most": rounded(max(noticed_s))},
        ready_again_s={"p50": rounded(percentile(again_s, 0.5)), "most": rounded(max(again_s))},
    )


@asynccontextmanager
async def _drawing(server: Server, step: int) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """Three clients, entered when the first one's picture has done `step` steps, left when all have their reply."""
    seen = asyncio.Event()

    def told(event: dict[str, Any]) -> None:
        if event.get("step", 0) >= step:
            seen.set()

    clients = [asyncio.create_task(follow(server.address, told, READY_S, seed=0, num_inference_steps=STEPS))]
    clients += [asyncio.create_task(draw(server.address, READY_S, seed=seed, num_inference_steps=STEPS)) for seed in (1, 2)]
    await asyncio.wait_for(seen.wait(), READY_S)
    yield clients
    await asyncio.gather(*clients)


async def _kill_starting(server: Server, after_s: float) -> int:
    """Kill a rank that is being started; returns 1, or 0 where all were ready before that."""
    await asyncio.sleep(after_s)
    starting = children(server.process.pid)
    if not starting or await server.is_ready():
        return 0
    os.kill(starting[-1], signal.SIGKILL)
    await until(lambda: not alive(starting[-1]), 60)
    return 1


async def _is_down(server: Server) -> bool:
    return not await server.is_ready()


def _only(reply: Reply) -> bytes | None:
    return reply.pictures[0] if reply.drawn else None


async def poison(count: int, model: str) -> dict[str, Any]:
    """A request during which the rank crashes both times, `count` times, with an innocent one beside it."""
    with served(model, *LASTING, "--set", "limits.steps=1000", threads=THREADS) as server:
        return await poison_of(server, count)


async def poison_of(server: Server, count: int) -> dict[str, Any]:
    """The same of a server with the settings LASTING and up to 1000 steps."""
    innocent, guilty, alike = Tally(), Tally(), Tally()
    calm = _only(innocent.count(await draw(server.address, seed=1)))
    others, again_s = 0, []
    for number in range(count):
        steps = 1000 - number  # each one another kind of request: kinds are refused for a while
        bad = asyncio.create_task(draw(server.address, READY_S, num_inference_steps=steps))
        await until(lambda: _draws(server, 1), READY_S)
        good = asyncio.create_task(draw(server.address, READY_S, seed=1))
        for _ in range(2):
            await until(lambda: _draws(server, 1), READY_S)
            await asyncio.sleep(0.05)
            os.kill((await server.rank_pids())[0], signal.SIGSEGV)  # as kernels crash; what is killed from outside is nobody's fault
            await until(lambda: _is_down(server), 60)
        guilty.count(await bad)
        refused = await draw(server.address, num_inference_steps=steps, seed=7)
        alike.count(refused)
        again_s.append(refused.seconds)
        others += _only(innocent.count(await good)) != calm
    checks = {
        "refused after the second death": guilty.outcomes == {"500 poison": count},
        "others like it refused at once": alike.outcomes == {"500 poison": count} and max(again_s) < 1.0,
        "the innocent drawn": innocent.outcomes == {"pictures": count + 1} and others == 0,
    }
    lost = [*innocent.lost, *guilty.lost, *alike.lost]
    return verdict(
        "500 for the request that loses its ranks twice and others like it, pictures for the rest",
        count,
        len(lost) + others + count - guilty.outcomes["500 poison"],
        checks,
        guilty=guilty.row(),
        others_like_it=alike.row(),
        innocent=innocent.row(),
        other_pictures=others,
    )


async def _draws(server: Server, at_least: int) -> bool:
    status = await server.status()
    return status["state"] == "ready" and status["running"] >= at_least


CRASHES = 2  # restarts that are allowed


async def crash_loop(count: int, model: str, crashes: int = CRASHES) -> dict[str, Any]:
    """Ranks that never last, `count` times: killed whenever they are there, and (every second time) unable to load a model that has gone."""
    tally, ended_s, late_s, codes = Tally(), [], [], []
    for number in range(count):
        with tempfile.TemporaryDirectory(prefix="dite_faults_") as folder:
            copied = break_class(model, Path(folder) / "model", "broken") if number % 2 else model
            with served(copied, "--set", f"max_restarts={crashes}", "--max-batch", "2", threads=THREADS) as server:
                clients = [asyncio.create_task(draw(server.address, READY_S, seed=seed, num_inference_steps=250)) for seed in range(6)]
                await until(lambda: _draws(server, 1), READY_S)
                if number % 2:
                    shutil.rmtree(copied)
                began, bound = time.monotonic(), (crashes + 1) * (2 * server.ready_s + 5.0)
                killing = asyncio.create_task(_keep_killing(server, once=bool(number % 2)))
                with suppress(TimeoutError):
                    await until(lambda: server.process.poll() is not None, bound)
                killing.cancel()
                ended_s.append(time.monotonic() - began)
                late_s.append(ended_s[-1] - bound)
                codes.append(server.process.poll())
                for client in clients:
                    tally.count(await client)
    checks = {
        "the server ends": None not in codes and max(late_s) < 0,
        "with an error": all(code not in (0, None) for code in codes),
        "everyone who waits is answered": not tally.lost,
        "with an error of ours": all(name[:3] in ("500", "503") for name in tally.outcomes),
    }
    return verdict(
        f"after {crashes} restarts: exit code ≠ 0 within {crashes + 1} × (2 starts + 5 s), everyone who waits answered",
        count,
        len(tally.lost) + sum(code in (0, None) for code in codes),
        checks,
        **tally.row(),
        exit_codes=codes,
        ended_s={"p50": rounded(percentile(ended_s, 0.5)), "most": rounded(max(ended_s))},
    )


async def _keep_killing(server: Server, once: bool) -> None:
    killed: set[int] = set()
    while not (once and killed):
        with suppress(ValueError, KeyError, ProcessLookupError):
            for pid in await server.rank_pids():
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        await asyncio.sleep(0.02)


async def not_a_number(count: int, model: str) -> dict[str, Any]:
    """Requests whose pictures are NaN, `count` times, drawn together with good ones."""
    with tempfile.TemporaryDirectory(prefix="dite_faults_") as folder:
        broken = break_class(model, Path(folder) / "model", "broken")
        with served(broken, "--max-batch", "4", "--micro-batch", "2", threads=THREADS) as server:
            return await not_a_number_of(server, count)


async def not_a_number_on_two_ranks(count: int, model: str) -> dict[str, Any]:
    """The same where two ranks share a picture: each such request takes both out of their group."""
    with tempfile.TemporaryDirectory(prefix="dite_faults_") as folder:
        broken = break_class(model, Path(folder) / "model", "broken")
        with served(broken, "--max-batch", "4", "--nproc", "2", "--codec", "int4", threads=THREADS) as server:
            return await not_a_number_of(server, count)


async def not_a_number_of(server: Server, count: int) -> dict[str, Any]:
    """The same of a server of a broken model with a fixed `--micro-batch`, or with ranks that remember (whose forwards hold one request each)."""
    bad, good, black, others = Tally(), Tally(), 0, 0
    calm = [_only(good.count(await draw(server.address, seed=seed))) for seed in range(2)]
    for number in range(count):
        asked = (
            draw(server.address, prompt=f"class:{BROKEN}", n=2)
            if number % 2
            else follow(server.address, lambda event: None, prompt=f"class:{BROKEN}", n=2)
        )
        answers = await asyncio.gather(asked, *(draw(server.address, seed=seed) for seed in range(2)))
        reply = bad.count(answers[0], n=2)
        black += sum(map(is_black, reply.pictures))
        others += sum(_only(good.count(answer)) != picture for answer, picture in zip(answers[1:], calm, strict=True))
    status = await server.status()
    checks = {
        "500 for the broken": bad.outcomes == {"500 NonFiniteOutput": count},
        "no black pictures": black == 0,
        "the others drawn as ever": good.outcomes == {"pictures": 2 * count + 2} and others == 0,
        "no restart": status["restarts"] == 0,
    }
    return verdict(
        "500 for that request only, never a black picture with 200",
        count,
        len(bad.lost) + len(good.lost) + black + others + count - bad.outcomes["500 NonFiniteOutput"],
        checks,
        broken=bad.row(),
        others=good.row(),
        black_pictures=black,
        other_pictures=others,
    )


MANY = 64  # pictures of a request that needs more memory than there is
ROOM_BYTES = 24 * 2**20
HUNGRY = ("--max-batch", "4", "--micro-batch", "16", "--set", f"limits.images={MANY}", "--set", "limits.steps=8", "--set", "max_restarts=1000")


async def out_of_memory(count: int, model: str) -> dict[str, Any]:
    """Requests for which the rank's address space, limited with setrlimit to little more than it has, is too small, `count` times."""
    with served(model, *HUNGRY, threads=THREADS) as server:
        return await out_of_memory_of(server, count)


async def out_of_memory_on_two_ranks(count: int, model: str) -> dict[str, Any]:
    """The same where two ranks share a picture, and neither has room."""
    with served(model, *HUNGRY, "--nproc", "2", "--codec", "int4", threads=THREADS) as server:
        return await out_of_memory_of(server, count)


async def out_of_memory_of(server: Server, count: int, room_bytes: int = ROOM_BYTES) -> dict[str, Any]:
    """The same of a server with the settings HUNGRY."""
    bad, good, others, before = Tally(), Tally(), 0, (await server.status())["restarts"]
    calm = [_only(good.count(await draw(server.address, seed=seed, num_inference_steps=8))) for seed in range(2)]
    for _ in range(count):
        for pid in await server.rank_pids():
            if resource.prlimit(pid, resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
                resource.prlimit(pid, resource.RLIMIT_AS, (_address_space(pid) + room_bytes, resource.RLIM_INFINITY))
        asked = draw(server.address, n=MANY, num_inference_steps=4)
        answers = await asyncio.gather(asked, *(draw(server.address, seed=seed, num_inference_steps=8) for seed in range(2)))
        bad.count(answers[0], n=MANY)
        others += sum(_only(good.count(answer)) != picture for answer, picture in zip(answers[1:], calm, strict=True))
        await until(server.is_ready, READY_S)
    restarts = (await server.status())["restarts"] - before
    checks = {
        "500 for the large": bad.outcomes == {"500 out_of_memory": count},
        "the others drawn as ever": good.outcomes == {"pictures": 2 * count + 2} and others == 0,
        "no restart": restarts == 0,
    }
    return verdict(
        "500 for that request only",
        count,
        len(bad.lost) + len(good.lost) + others + count - bad.outcomes["500 out_of_memory"],
        checks,
        large=bad.row(),
        others=good.row(),
        other_pictures=others,
        restarts=restarts,
        images=MANY,
        room_bytes=room_bytes,
    )


def _address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
