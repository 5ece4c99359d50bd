"""Every mode of exchange under a server: requests drawn side by side are what each is alone."""

import asyncio

import pytest
from living import NOT_A_NUMBER, UNKNOWN, living, save_model
from pipelines import request

from dite.server.problems import Problem

MODES = [
    {},
    {"micro_batch": 4},
    {"nproc": 2, "codec": "none"},
    {"nproc": 2, "codec": "none", "micro_batch": 1},
    {"nproc": 2, "codec": "int4", "micro_batch": 1},
    {"nproc": 2, "mode": "ring", "codec": "int8"},
    {"nproc": 2, "mode": "ulysses", "codec": "int4"},
    {"nproc": 2, "mode": "displaced", "codec": "int4"},
    {"nproc": 2, "mode": "displaced", "codec": "none"},
    {"nproc": 2, "mode": "pipefusion", "codec": "int4"},
    {"nproc": 2, "mode": "cfg"},
    {"nproc": 2, "mode": "auto"},
    {"nproc": 3, "mode": "kv_gather", "codec": "topk-8"},
    {"nproc": 4, "mode": "cfg+ring", "codec": "int2"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODES, ids=lambda settings: " ".join(str(value) for value in settings.values()) or "one device")
def test_requests_side_by_side_are_what_each_is_alone(model, settings):
    async def story():
        async with living(model, **settings) as service:
            jobs = [service.submit(request(number, steps=steps, n=n, seed=number)) for number, steps, n in ((1, 6, 1), (2, 9, 5), (3, 6, 1))]
            together = [(await asyncio.wait_for(job.outcome(), 60)).images for job in jobs]
            alone = await asyncio.wait_for(service.submit(request(2, steps=9, n=5, seed=2)).outcome(), 60)
            assert alone.images == together[1] and service.status()["restarts"] == 0

    asyncio.run(story())


SHARED = [one for one in MODES if one.get("nproc", 1) > 1 and one.get("mode") != "auto"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SHARED, ids=lambda settings: " ".join(str(value) for value in settings.values()))
@pytest.mark.parametrize("bad", [NOT_A_NUMBER, UNKNOWN], ids=["nan", "error"])
def test_a_request_that_fails_between_ranks_changes_no_picture_beside_it(model, settings, bad):
    async def story():
        async with living(model, **settings, max_restarts=0) as service:
            wanted = [request(1, steps=8, n=2, seed=1), request(3, steps=6, seed=3)]
            calm = [(await asyncio.wait_for(service.submit(one).outcome(), 60)).images for one in wanted]
            for _ in range(2):
                jobs = [service.submit(wanted[0]), service.submit(request(bad, steps=6)), service.submit(wanted[1])]
                with pytest.raises(Problem) as failed:
                    await asyncio.wait_for(jobs[1].outcome(), 60)
                beside = [await asyncio.wait_for(jobs[place].outcome(), 60) for place in (0, 2)]
                assert failed.value.code in ("NonFiniteOutput", "IndexError")
                assert [one.images for one in beside] == calm and [one.attempts for one in beside] == [1, 1]
            assert service.status()["restarts"] == 0

    asyncio.run(story())
