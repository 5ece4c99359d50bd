"""Every mode of exchange under a server: requests drawn side by side are what each is alone."""

import asyncio

import pytest
from living import living, save_model
from pipelines import request

MODES = [
    {},
    {"micro_batch": 4},
    {"nproc": 2, "codec": "none"},
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
            jobs = [service.submit(request(number, steps=steps, n=n, seed=number)) for number, steps, n in ((1, 6, 1), (2, 9, 2), (3, 6, 1))]
            together = [(await asyncio.wait_for(job.outcome(), 60)).images for job in jobs]
            alone = await asyncio.wait_for(service.submit(request(2, steps=9, n=2, seed=2)).outcome(), 60)
            assert alone.images == together[1] and service.status()["restarts"] == 0

    asyncio.run(story())
