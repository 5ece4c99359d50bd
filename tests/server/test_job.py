"""A job ends once, and everyone who listens is told."""

import asyncio

import pytest
from pipelines import request

from dite.server.job import Job, Pictures, Progress
from dite.server.problems import Problem

DONE = Pictures([b"png"], 0.0, 1.0, 1)


def job():
    return Job(request(), arrived_s=0.0, deadline_s=1.0)


def test_the_first_end_counts_and_nothing_is_told_after_it():
    async def story():
        one = job()
        heard = []

        async def listen():
            heard.extend([event async for event in one.events()])

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        for event in (Progress(1, 2), DONE, Problem(500, "late", "too late"), Progress(2, 2)):
            one.report(event)
        await asyncio.wait_for(listening, 5)
        assert heard == [Progress(1, 2), DONE] and await one.outcome() is DONE
        assert [event async for event in one.events()] == [DONE]

    asyncio.run(story())


def test_a_problem_is_raised_to_whoever_waits():
    async def story():
        one = job()
        waiting = asyncio.create_task(one.outcome())
        await asyncio.sleep(0)
        one.report(Problem(504, "deadline_exceeded", "late"))
        with pytest.raises(Problem, match="late"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(story())


def test_seeds_count_up_and_stay_within_torchs_range():
    assert request(n=3, seed=2**32 - 2).seeds == [2**32 - 2, 2**32 - 1, 0]
