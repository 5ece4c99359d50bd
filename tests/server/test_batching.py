"""Who may join whom."""

import pytest
from pipelines import request

from dite.server.batching import fits
from dite.server.job import Job


def job(attempts=0, **changes):
    return Job(request(**changes), arrived_s=0.0, deadline_s=1.0, attempts=attempts)


@pytest.mark.parametrize("policy", ["continuous", "dynamic", "none"])
def test_an_idle_server_takes_anyone(policy):
    assert fits(policy, 4, job(n=9), [], fresh=True)


def test_continuous_batches_take_any_kind_at_any_time_as_long_as_there_is_room():
    running = [job(1, n=2, steps=3)]
    assert fits("continuous", 4, job(n=2, steps=50, guidance=1.0), running, fresh=False)
    assert not fits("continuous", 4, job(n=3), running, fresh=False)


@pytest.mark.parametrize(
    ("changes", "fresh", "expected"),
    [({}, True, True), ({}, False, False), ({"steps": 9}, True, False), ({"guidance": 1.0}, True, False), ({"guidance": 7.0}, True, True)],
)
def test_dynamic_batches_are_of_one_kind_and_closed_once_begun(changes, fresh, expected):
    assert fits("dynamic", 4, job(**changes), [job(1)], fresh) is expected


def test_without_batching_one_is_drawn_at_a_time():
    assert not fits("none", 4, job(), [job(1)], fresh=True)


def test_a_job_that_is_drawn_again_is_drawn_alone():
    assert not fits("continuous", 4, job(attempts=1), [job(1)], fresh=True)
    assert not fits("continuous", 4, job(), [job(attempts=2)], fresh=True)
