"""Faults injected into a real `dite serve`, a few of each: what has to hold on any machine. How fast it does is measured by evals/serve_faults.py.

The tests of a server run in their order, and the last of them ends it. See tests/cli/test_serve.py for ranks that are killed under `dite serve`.
"""

import asyncio
import signal

import pytest
from living import save_model

from dite_evals import serve_faults_ends as ends
from dite_evals import serve_faults_input as inputs
from dite_evals import serve_faults_load as load
from dite_evals import serve_faults_logs as logs
from dite_evals import serve_faults_ranks as ranks
from dite_evals.serve_replies import Tally
from dite_evals.serving import served

TIMES = {"capacity back in time", "healthy as before", "noticed in time", "admitted in time", "refused at once", "goodput", "ends at once"}
PATIENT = ("--set", "limits.header_timeout_s=1", "--set", "limits.body_timeout_s=1", "--set", f"limits.body_bytes={inputs.BODY_BYTES}")
EXACT = ("--micro-batch", "2")  # pictures with the same bits whatever is drawn beside them


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def visited(model):
    """A server whose clients are the fault."""
    with served(model, *load.LEAVING, *PATIENT, *EXACT, threads=1) as server:
        yield server


@pytest.fixture(scope="module")
def wounded(model):
    """A server whose ranks are."""
    with served(model, *ranks.STOPPABLE, "--set", "limits.steps=1000", "--set", f"limits.images={ranks.MANY}", threads=1) as server:
        yield server


def holds(injected):
    row = asyncio.run(injected)
    assert set(row["missed"]) <= TIMES, row


def test_clients_that_leave_free_their_places_and_permits(visited):
    holds(load.disconnects_of(visited, 16))


def test_slow_clients_take_nothing_from_others(visited):
    holds(load.slow_sockets_of(visited, 8, rounds=1, healthy=8))


def test_whatever_is_sent_is_answered_without_a_5xx(visited):
    holds(inputs.malformed_of(visited, 300))


def test_nan_is_an_error_of_that_request_and_never_a_black_picture(visited):
    holds(ranks.not_a_number_of(visited, 2))


def test_no_word_of_a_request_is_logged(visited):
    assert asyncio.run(logs.say(visited, text=False)) > 20 and visited.logged() and not logs.spoken(visited)


def test_two_servers_on_one_host_draw_the_same_and_a_taken_port_is_refused(visited, wounded, model):
    holds(ends.neighbours_of(visited, wounded, 2, model))


def test_a_server_that_is_told_to_stop_answers_what_it_has_accepted(visited):
    tally = Tally()
    stopped = asyncio.run(ends.stop_of(visited, 0.5, tally))
    assert (stopped.exit_code, stopped.orphans, tally.lost) == (0, 0, []) and tally.outcomes["pictures"] and not logs.spoken(visited)


@pytest.mark.chaos
def test_a_rank_that_is_killed_changes_no_picture(wounded):
    holds(ranks.interrupted(wounded, 1, signal.SIGKILL))


def test_a_rank_that_is_stopped_changes_no_picture(wounded):
    holds(ranks.interrupted(wounded, 1, signal.SIGSTOP))


def test_a_request_that_crashes_its_ranks_is_refused_and_others_are_drawn(wounded):
    holds(ranks.poison_of(wounded, 1))


def test_a_server_with_too_much_to_do_loses_nothing(wounded):
    holds(load.overload_of(wounded, 2, measured_s=0.5))


def test_a_request_that_needs_too_much_memory_fails_alone(wounded):
    holds(ranks.out_of_memory_of(wounded, 1, room_bytes=8 * 2**20))


def test_a_second_signal_ends_a_server_at_once(wounded):
    tally = Tally()
    stopped = asyncio.run(ends.abort_of(wounded, tally))
    assert stopped.exit_code not in (0, None) and stopped.orphans == 0 and not tally.lost and tally.outcomes == {"503 shutting_down": ends.WAITING}


def test_a_server_whose_ranks_never_last_ends(model):
    holds(ranks.crash_loop(1, model, crashes=0))


@pytest.mark.chaos
def test_ranks_do_not_outlive_a_server_that_is_killed(model):
    with served(model, threads=1) as server:
        assert asyncio.run(ends.kill_of(server))[1] == 0


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("inject", "count"),
    [
        (load.overload, 3),
        (logs.prompts_in_logs, 1),
        (ranks.one_of_two_ranks_killed, 2),
        (ranks.crash_loop, 2),
        (ranks.not_a_number_on_two_ranks, 2),
        (ranks.out_of_memory_on_two_ranks, 2),
        (ends.told_twice, 1),
        (ends.supervisor_killed, 3),
        (ends.two_servers, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_takes_servers_of_its_own(model, inject, count):
    holds(inject(count, model))
