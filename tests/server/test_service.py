"""Everything accepted ends exactly once, whatever the ranks do. The ranks here are puppets; see test_supervisor for real ones."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from pipelines import request

from dite.server.card import ModelCard
from dite.server.frames import pack
from dite.server.job import Pictures, Progress
from dite.server.problems import Problem
from dite.server.ranks import Ranks, RanksLost
from dite.server.service import Service
from dite.server.settings import ServerSettings

CARD = ModelCard("DiTPipeline", reads_text=False, classes={"cat": 3}, class_ids=[3], default_size_px=(32, 32))


KILLED, CRASHED = RanksLost("rank 0 ended by signal SIGKILL"), RanksLost("rank 0 ended by signal SIGSEGV", own=True)


class Puppets:
    """Ranks that do nothing; the test speaks for them."""

    def __init__(self, service):
        self.service, self.sent, self.step_due_s = service, [], None
        self.processes = [SimpleNamespace(number=0, popen=SimpleNamespace(pid=1), memory_bytes=0)]

    def send(self, message, to=None):
        self.sent.append(message)

    def facts(self):
        return []

    @property
    def started(self):
        return [message["job"] for message in self.sent if message["type"] == "start"]

    def done(self, job):
        self.service.rank_said(0, {"type": "done", "job": job.id, "sizes": [2] * job.request.n, "seconds": 0.5}, b"ab" * job.request.n)

    def step(self, job, step=1, seconds=0.5):
        self.service.rank_said(0, {"type": "steps", "steps": {job.id: step}, "seconds": seconds, "pictures": 1}, b"")

    def ended(self, job):
        self.service.rank_said(0, {"type": "ended", "job": job.id}, b"")


def story(**settings):
    """Run an async test with a service that has puppets for ranks."""

    def decorate(test):
        def run():
            async def within():
                service = Service(ServerSettings(model="m", **settings))
                puppets = Puppets(service)
                service.ranks_ready(puppets, CARD)
                await asyncio.wait_for(test(service, puppets), 20)

            asyncio.run(within())

        run.__name__ = test.__name__
        return run

    return decorate


def problem(job):
    assert isinstance(job.ended, Problem)
    return job.ended.status, job.ended.code


@story()
async def test_a_request_is_given_to_the_ranks_and_gets_its_pictures(service, ranks):
    job = service.submit(request(n=2))
    heard = []
    listening = asyncio.create_task(_collect(job, heard))
    await asyncio.sleep(0)
    ranks.step(job)
    ranks.done(job)
    pictures = await job.outcome()
    await listening
    assert pictures.images == [b"ab", b"ab"] and pictures.attempts == 1 and heard[0] == Progress(1, 4) and isinstance(heard[-1], Pictures)
    assert service.status()["images"] == 2 and service.admission.running == 0 and ranks.step_due_s is None


async def _collect(job, heard):
    async for event in job.events():
        heard.append(event)


@story(max_batch=2)
async def test_as_many_are_drawn_at_once_as_may_be_and_the_next_when_one_is_done(service, ranks):
    jobs = [service.submit(request(seed=seed)) for seed in range(3)]
    assert ranks.started == [jobs[0].id, jobs[1].id] and len(service.admission) == 1
    ranks.done(jobs[1])
    assert ranks.started[-1] == jobs[2].id


@story(batching="dynamic", max_batch=4)
async def test_a_dynamic_batch_is_made_of_what_waits_when_the_last_one_is_done(service, ranks):
    first = service.submit(request())
    later = [service.submit(request(seed=seed)) for seed in (1, 2)] + [service.submit(request(steps=9))]
    assert ranks.started == [first.id]
    ranks.done(first)
    assert ranks.started[1:] == [later[0].id, later[1].id]


@story(max_queue=1, max_batch=1, steps=4, guidance=2.0)
async def test_too_much_work_is_refused_and_what_was_accepted_is_not_touched(service, ranks):
    running, waiting = service.submit(request()), service.submit(request())
    with pytest.raises(Problem, match="waiting"):
        service.submit(request())
    ranks.done(running)
    ranks.done(waiting)
    assert isinstance(running.ended, Pictures) and isinstance(waiting.ended, Pictures)


@story(max_batch=1)
async def test_who_leaves_while_waiting_is_never_drawn(service, ranks):
    first, second, third = (service.submit(request(seed=seed)) for seed in range(3))
    service.cancel(second)
    ranks.done(first)
    assert problem(second) == (499, "cancelled") and ranks.started == [first.id, third.id]


@story(max_batch=1)
async def test_who_leaves_while_drawn_keeps_the_place_until_the_ranks_have_let_go(service, ranks):
    first, second = service.submit(request()), service.submit(request())
    service.cancel(first)
    assert ranks.sent[-1] == {"type": "cancel", "job": first.id} and ranks.started == [first.id]
    ranks.ended(first)
    assert ranks.started == [first.id, second.id] and problem(first) == (499, "cancelled")


@story()
async def test_a_request_that_takes_too_long_ends_at_its_deadline(service, ranks):
    job = service.submit(request(), timeout_s=0.05)
    with pytest.raises(Problem, match=r"0\.05 s"):
        await job.outcome()
    assert problem(job) == (504, "deadline_exceeded") and ranks.sent[-1]["type"] == "cancel"


@story(max_batch=2)
async def test_what_dead_ranks_were_drawing_is_drawn_once_more_alone_and_before_all_others(service, ranks):
    jobs = [service.submit(request(seed=seed)) for seed in range(3)]
    service.ranks_lost(KILLED)
    assert not service.is_ready and service.state == "restarting"
    service.ranks_ready(again := Puppets(service), CARD)
    assert again.started == [jobs[0].id] and service.is_ready
    for job in jobs:
        again.done(job)
    assert again.started == [job.id for job in jobs] and [job.ended.attempts for job in jobs] == [2, 2, 1]


def lose_twice(service, job, lost):
    """The job is drawn, its ranks are lost, and those after them as well; new ones are there."""
    for _ in range(2):
        assert service._ranks.started[-1] == job.id
        service.ranks_lost(lost)
        service.ranks_ready(last := Puppets(service), CARD)
    return last


@story()
async def test_a_request_that_crashes_its_ranks_twice_is_refused_and_so_are_others_like_it_for_a_while(service, ranks):
    good, bad = service.submit(request()), service.submit(request(steps=99))
    ranks.done(good)
    lose_twice(service, bad, CRASHED)
    assert problem(bad) == (500, "poison") and bad.ended.headers()["x-should-retry"] == "false" and isinstance(good.ended, Pictures)
    with pytest.raises(Problem, match="lost its ranks"):
        service.submit(request(steps=99, seed=5))
    service.submit(request(steps=98))


@story()
async def test_what_is_killed_from_outside_makes_others_suspect_only_the_second_time(service, ranks):
    first = service.submit(request(seed=1))
    lose_twice(service, first, KILLED)
    second = service.submit(request(seed=2))  # of the same kind, and welcome
    lose_twice(service, second, KILLED)
    assert problem(first) == problem(second) == (500, "poison")
    with pytest.raises(Problem, match="lost its ranks"):
        service.submit(request(seed=3))


@story(step_timeout_s=5)
async def test_who_joins_a_step_gives_it_no_more_time(service, ranks):
    service.submit(request())
    due = ranks.step_due_s
    await asyncio.sleep(0.01)
    job = service.submit(request(seed=1))
    assert due and ranks.step_due_s == due
    ranks.step(job)
    assert ranks.step_due_s > due


@story(step_timeout_s=3)
async def test_requests_whose_steps_would_take_too_long_together_take_turns(service, ranks):
    service.card = replace(CARD, step_s=1.0)
    jobs = [service.submit(request(seed=seed, n=2)) for seed in range(2)] + [service.submit(request(seed=3))]
    assert ranks.started == [jobs[0].id]
    ranks.done(jobs[0])
    assert ranks.started == [job.id for job in jobs]


@story()
async def test_a_request_that_fails_by_itself_is_told_why_and_not_tried_again(service, ranks):
    job = service.submit(request())
    error = {"type": "NonFiniteOutput", "what": "the model's output is not finite", "why": "row 0", "try": ""}
    service.rank_said(0, {"type": "failed", "job": job.id, "error": error, "status": 500, "memory": False}, b"")
    assert problem(job) == (500, "NonFiniteOutput") and "not finite" in job.ended.message and job.ended.retry is False


@story(max_batch=1)
async def test_draining_finishes_what_was_accepted_and_takes_nothing_new(service, ranks):
    running, waiting = service.submit(request()), service.submit(request())
    draining = asyncio.create_task(service.drain())
    await asyncio.sleep(0)
    with pytest.raises(Problem, match="shutting down"):
        service.submit(request())
    ranks.done(running)
    ranks.done(waiting)
    assert await draining and not service.is_ready


@story(drain_timeout_s=0.05)
async def test_a_drain_that_takes_too_long_answers_everybody(service, ranks):
    job = service.submit(request())
    assert await service.drain() is False and problem(job) == (503, "shutting_down")


@story(max_batch=1)
async def test_ended_jobs_leave_no_timer_behind(service, ranks):
    first, second = service.submit(request()), service.submit(request())
    service.cancel(second)
    ranks.done(first)
    assert service._timers == {}


def test_a_message_that_cannot_be_used_restarts_the_ranks_instead_of_going_unheard():
    async def story():
        reader = asyncio.StreamReader()
        reader.feed_data(pack({"type": "steps"}))
        ranks = Ranks(ServerSettings(model="m"), lambda rank, message, raw: message["seconds"])
        await ranks._listen(SimpleNamespace(number=0, heard_s=0.0, popen=None), reader)
        assert "KeyError" in (await asyncio.wait_for(ranks.lost(), 5)).reason
        await ranks.kill()

    asyncio.run(story())


def test_before_the_model_is_loaded_requests_are_told_to_come_back():
    with pytest.raises(Problem, match="being loaded") as refused:
        Service(ServerSettings(model="m")).submit(request())
    assert refused.value.status == 503 and refused.value.retry_after_s
