"""Real ranks under a service: they die, stand still, draw NaN, can't start; nothing accepted is lost."""

import asyncio
import os
import signal
import time

import pytest
from living import NOT_A_NUMBER, UNKNOWN, exists, living, pids, save_model, until
from pipelines import request

from dite.errors import RankLost
from dite.server.problems import Problem
from dite.server.supervisor import RestartBudget, StartFailed


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


async def mid_picture(service, job, step=3):
    events = job.events()
    async for event in events:
        if getattr(event, "step", 0) >= step:
            return
        assert job.ended is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_killed_in_the_middle_of_a_picture_costs_time_and_nothing_else(model, ranks):
    async def story():
        async with living(model, nproc=ranks, codec="int4") as service:
            calm = (await asyncio.wait_for(service.submit(request(2, steps=40)).outcome(), 60)).images
            job = service.submit(request(2, steps=40))
            await mid_picture(service, job)
            os.kill(pids(service)[-1], signal.SIGKILL)
            killed = time.monotonic()
            await until(lambda: not service.is_ready, 1.0)
            noticed_s = time.monotonic() - killed
            pictures = await asyncio.wait_for(job.outcome(), 60)
            assert pictures.images == calm and pictures.attempts == 2 and noticed_s < 1.0 and service.status()["restarts"] == 1

    asyncio.run(story())


def test_requests_that_fail_in_what_ranks_share_fail_by_themselves_and_one_called_off_leaves_no_trace(model):
    async def story():
        async with living(model, nproc=2, mode="ring", codec="int8", max_restarts=0) as service:
            calm = (await asyncio.wait_for(service.submit(request(3, steps=6)).outcome(), 60)).images
            for bad in (NOT_A_NUMBER, UNKNOWN, NOT_A_NUMBER, NOT_A_NUMBER, UNKNOWN):
                neighbour, guilty = service.submit(request(3, steps=6)), service.submit(request(bad))
                with pytest.raises(Problem, match="NaN or infinity" if bad == NOT_A_NUMBER else "out of range") as failed:
                    await asyncio.wait_for(guilty.outcome(), 60)
                pictures = await asyncio.wait_for(neighbour.outcome(), 60)
                assert failed.value.status == 500 and failed.value.code != "poison"
                assert (pictures.images, pictures.attempts, service.status()["restarts"]) == (calm, 1, 0)
            gone = service.submit(request(4, steps=900))
            await mid_picture(service, gone)
            service.cancel(gone)
            again = await asyncio.wait_for(service.submit(request(3, steps=6)).outcome(), 60)
            assert again.images == calm

    asyncio.run(story())


def test_a_rank_that_stands_still_is_missed_within_its_timeout_and_a_second(model):
    async def story():
        async with living(model, heartbeat_timeout_s=1.5) as service:
            job = service.submit(request(2, steps=300))
            await mid_picture(service, job)
            stopped = pids(service)[0]
            os.kill(stopped, signal.SIGSTOP)
            began = time.monotonic()
            await until(lambda: not service.is_ready, 5)
            assert time.monotonic() - began < 1.5 + 1.0
            await asyncio.wait_for(job.outcome(), 60)
            assert not exists(stopped)

    asyncio.run(story())


def test_ranks_that_keep_dying_end_the_service_and_whoever_waits_is_told(model):
    async def story():
        async with living(model, max_restarts=0) as service:
            job = service.submit(request(2, steps=900))
            await mid_picture(service, job)
            os.kill(pids(service)[0], signal.SIGKILL)
            with pytest.raises(Problem, match="going down"):
                await asyncio.wait_for(job.outcome(), 20)

    with pytest.raises(RankLost, match="keep dying"):
        asyncio.run(story())


def test_a_model_that_is_not_there_is_refused_in_the_ranks_own_words(tmp_path):
    async def story():
        async with living(str(tmp_path / "nothing")):
            pass

    with pytest.raises(StartFailed, match="no model at"):
        asyncio.run(story())


def test_a_restart_budget_forgets_what_is_long_past():
    now = [0.0]
    budget = RestartBudget(2, 10.0, lambda: now[0])
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    now[0] = 11.0
    assert budget.spend()
