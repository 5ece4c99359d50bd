"""Which request, branch and step a call belongs to."""

import pytest

from dite.parallel.clock import MOST_BRANCHES, MOST_REQUESTS, Clock


def told():
    clock = Clock()
    clock.told = True
    clock.restart()
    return clock


def places(clock, timesteps):
    return [(moment.epoch, moment.branch, moment.step) for moment in map(clock.tick, timesteps)]


def test_steps_are_counted_from_a_requests_beginning():
    clock = told()
    assert places(clock, [900, 800, 700]) == [(1, 0, 0), (1, 0, 1), (1, 0, 2)]
    clock.restart()
    assert places(clock, [900]) == [(2, 0, 0)]


def test_calls_of_one_timestep_are_branches():
    assert places(told(), [900, 900, 800, 800]) == [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]


def test_branches_that_a_pipeline_names_have_steps_of_their_own():
    clock, found = told(), []
    for timestep, context in ((900, "cond"), (900, "uncond"), (800, "uncond"), (800, "cond")):
        clock.context = context
        found += places(clock, [timestep])
    assert found == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)]


def test_a_second_order_scheduler_that_calls_twice_at_nearby_timesteps_makes_no_gap():
    assert [step for _, _, step in places(told(), [900, 850, 850.0001, 800, 750])] == [0, 1, 2, 3, 4]


def test_a_scheduler_whose_timesteps_rise_within_a_request_does_not_begin_another():
    assert {epoch for epoch, _, _ in places(told(), [900, 950, 800])} == {1}


def test_a_bare_models_request_begins_when_the_timestep_rises():
    assert places(Clock(), [900, 800, 900, 800]) == [(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1)]


def test_a_loop_that_never_changes_the_timestep_is_many_requests_and_not_endless_branches():
    found = places(Clock(), [500] * (2 * MOST_BRANCHES))
    assert max(branch for _, branch, _ in found) == MOST_BRANCHES - 1 and {epoch for epoch, *_ in found} == {1, 2}


def test_named_requests_keep_their_own_count():
    clock = Clock()
    assert places(clock, [900]) == [(1, 0, 0)]
    before = clock.switch("other")
    assert places(clock, [900, 800]) == [(2, 0, 0), (2, 0, 1)]
    clock.switch(before)
    assert places(clock, [800]) == [(1, 0, 1)]


def test_a_finished_request_is_forgotten_and_its_number_never_used_again():
    clock = Clock()
    clock.switch("one")
    clock.tick(900)
    clock.finish("one")
    assert clock.epochs() == set()
    assert places(clock, [900]) == [(2, 0, 0)]


def test_the_oldest_of_too_many_requests_are_forgotten():
    clock = Clock()
    for number in range(MOST_REQUESTS + 5):
        clock.switch(str(number))
        clock.tick(900)
    assert clock.epochs() == set(range(6, MOST_REQUESTS + 6))


def test_parts_of_a_call_are_one_call_however_many_they_are():
    clock, found = told(), []
    for timestep in (900, 800):
        for part in range(3 * MOST_BRANCHES):
            clock.part = part
            found += places(clock, [timestep])
    assert found == [(1, part, step) for step in (0, 1) for part in range(3 * MOST_BRANCHES)]


def test_parts_of_the_calls_of_one_step_are_told_apart():
    clock, found = told(), []
    for _ in range(2):
        for part in (0, 1):
            clock.part = part
            found += places(clock, [900])
    assert found == [(1, branch, 0) for branch in range(4)]


@pytest.mark.parametrize("inputs", [0, 2**32 - 1])
def test_a_moment_carries_the_checksum_of_its_inputs(inputs):
    assert told().tick(900, inputs).inputs == inputs
