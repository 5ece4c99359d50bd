"""The queue is bounded by work; everyone in it meets a deadline, as far as can be foreseen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import request

from dite.server.admission import Admission, Rate
from dite.server.job import Job
from dite.server.problems import Problem


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def job(steps=10, deadline_s=1e9, **changes):
    return Job(
        request(steps=steps, guidance=1.0, width_px=1000, height_px=1000, **changes), arrived_s=100.0, deadline_s=deadline_s
    )  # cost = n · steps


def admission(bound=100.0, per_second=None):
    one = Admission(bound, Clock())
    one.rate.per_second = per_second
    return one


def test_the_queue_holds_as_much_work_as_it_may_and_refuses_the_next():
    queue = admission(bound=25)
    queue.offer(job())
    queue.offer(job())
    with pytest.raises(Problem) as refused:
        queue.offer(job())
    assert (refused.value.status, refused.value.code, len(queue)) == (429, "queue_full", 2)
    queue.offer(job(steps=5))
    assert queue.waiting == 25


def test_a_job_that_begins_at_once_needs_no_room_in_the_queue():
    queue = admission(bound=0)
    queue.offer(job(), at_once=True)
    assert queue.take().request.steps == 10


def test_the_time_to_come_back_is_that_of_the_work_in_the_way():
    queue = admission(bound=20, per_second=2.0)
    queue.offer(job())
    queue.offer(job())
    with pytest.raises(Problem) as refused:
        queue.offer(job())
    assert refused.value.retry_after_s == 5.0 and int(refused.value.headers()["retry-after"]) >= 5


def test_a_job_that_would_come_too_late_is_refused_at_once_with_by_how_much():
    queue = admission(per_second=1.0)
    queue.running = 30.0
    queue.offer(job(deadline_s=141.0))
    with pytest.raises(Problem) as refused:
        queue.offer(job(deadline_s=141.0))
    assert refused.value.code == "deadline_unreachable" and refused.value.retry_after_s == pytest.approx(9.0) and len(queue) == 1


def test_before_anything_is_measured_nobody_is_refused_for_a_deadline():
    admission().offer(job(deadline_s=100.0))


def test_jobs_to_be_drawn_again_go_first_in_their_order():
    queue, jobs = admission(), [job() for _ in range(4)]
    for one in jobs:
        queue.offer(one)
    again = [queue.take(), queue.take()]
    queue.put_back(again)
    assert queue.everyone() == jobs


def test_who_leaves_the_queue_is_not_taken_from_it():
    queue, one, other = admission(), job(), job()
    queue.offer(one)
    queue.offer(other)
    assert queue.remove(one) and not queue.remove(one) and queue.take() is other and queue.first() is None


def test_the_rate_is_that_of_a_busy_server():
    rate = Rate()
    rate.observe(1.0, 1.0)
    for _ in range(60):
        rate.observe(8.0, 2.0)
    busy = rate.per_second
    for _ in range(10):
        rate.observe(1.0, 1.0)
    assert 3.9 < busy <= 4.0 and rate.per_second > 0.9 * busy


@given(st.lists(st.tuples(st.sampled_from(["offer", "take", "remove", "back"]), st.integers(1, 40)), max_size=60), st.integers(0, 100))
def test_whatever_happens_no_more_than_the_bound_waits_and_nobody_is_lost_or_doubled(happenings, bound):
    queue, waiting, taken = admission(bound), [], []
    for what, steps in happenings:
        if what == "offer":
            one = job(steps)
            try:
                queue.offer(one)
                waiting.append(one)
            except Problem:
                assert queue.waiting + one.request.cost > bound
        elif what == "take" and waiting:
            taken.append(queue.take())
            assert taken[-1] is waiting.pop(0)
        elif what == "remove" and waiting:
            assert queue.remove(waiting.pop(steps % len(waiting)))
        elif what == "back" and taken:
            queue.put_back(taken)
            waiting, taken, bound = taken + waiting, [], float("inf")
            queue.bound = bound
        assert queue.everyone() == waiting and queue.waiting <= bound
