"""The rate controller: raises at once, lowers with patience, holds the error bound first, and all ranks decide alike."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import UsageError
from dite.parallel.controller import Candidate, Measurement, RateController, Target, worst

CANDIDATES = [Candidate("int1", 1_000, 0.8), Candidate("int2", 2_000, 0.33), Candidate("int4", 4_000, 0.085), Candidate("int8", 8_000, 0.005)]
SIZES = {candidate.codec: candidate.sent_bytes for candidate in CANDIDATES}
measurements = st.builds(Measurement, st.floats(1, 1e10), st.floats(0, 0.01), st.floats(0, 0.01), st.floats(0, 1))
runs = st.lists(st.lists(measurements, min_size=1, max_size=4), min_size=1, max_size=30)
targets = st.builds(Target, st.floats(0, 0.1), st.floats(0, 0.5), st.integers(0, 5), st.floats(0, 1))


def seen(bandwidth=1e6, change=0.01, latency=0.0, compute=0.0):
    return [Measurement(bandwidth, latency, compute, change)]


def controller(**how) -> RateController:
    """With 5 ms a step and an error bound of 0.05: at 1 MB/s int4 fits, and at a change of 0.01 int1 meets the bound."""
    return RateController(CANDIDATES, Target(time_budget_s=0.005, error_bound=0.05), **how)


def test_bits_are_spent_while_there_is_time():
    assert [controller(start="int1").update(seen(bandwidth)) for bandwidth in (1e5, 1e6, 3e6)] == ["int1", "int4", "int8"]


def test_the_error_bound_wins_over_the_time_budget():
    assert [controller(start="int1").update(seen(1.0, change)) for change in (0.01, 0.15, 0.5, 1.0)] == ["int1", "int2", "int4", "int8"]


def test_where_nothing_meets_the_bound_the_best_is_used():
    assert controller(start="int1").update(seen(1.0, change=500.0)) == "int8"


def test_a_raise_is_immediate_and_a_fall_takes_three_steps():
    one = controller(start="int2")
    assert one.update(seen(3e6)) == "int8"
    assert [one.update(seen(1.0)) for _ in range(4)] == ["int8", "int8", "int1", "int1"]


def test_it_falls_no_further_than_the_highest_of_the_three_steps():
    one = controller(start="int8")
    assert [one.update(seen(bandwidth)) for bandwidth in (1.0, 1e6, 1.0)] == ["int8", "int8", "int4"]


def test_one_good_step_starts_the_patience_anew():
    one = controller(start="int8")
    assert [one.update(seen(bandwidth)) for bandwidth in (1.0, 1.0, 3e6, 1.0, 1.0, 1.0)] == ["int8"] * 5 + ["int1"]


def test_compute_and_latency_take_their_share_of_the_time():
    assert controller(start="int1").update(seen(3e6, compute=0.004)) == "int2"
    latencies = Target(time_budget_s=0.005, error_bound=0.05, messages=4)
    assert RateController(CANDIDATES, latencies, "int1").update(seen(3e6, latency=0.001)) == "int2"
    hidden = Target(time_budget_s=0.005, error_bound=0.05, overlap=1.0)
    assert RateController(CANDIDATES, hidden, "int1").update(seen(3e6, compute=0.004)) == "int8"


def test_a_budget_that_fits_to_the_byte_fits():
    assert controller(start="int1").update(seen(800_000.0)) == "int4" and controller(start="int1").update(seen(799_999.0)) == "int2"


def test_it_starts_with_the_most_bytes_unless_told():
    assert controller().codec == "int8" and controller(start="int2").codec == "int2"


@settings(max_examples=100, deadline=None)
@given(runs, targets, st.randoms())
def test_ranks_decide_alike_in_any_order_and_from_reduced_integers(run, target, random):
    given_, shuffled, reduced = (RateController(CANDIDATES, target) for _ in range(3))
    for step in run:
        codec = given_.update(step)
        assert shuffled.update(random.sample(step, len(step))) == codec
        assert reduced.update([Measurement.from_integers(worst(step))]) == codec


@settings(max_examples=100, deadline=None)
@given(runs, targets, st.integers(1, 3))
def test_the_record_replays_the_same_decisions(run, target, layers):
    one = RateController(CANDIDATES, target)
    used = [one.codec] + [one.update(step) for step in run]
    schedule = type(one.record()).from_json(one.record(layers).to_json())
    assert [[schedule.codec(step, layer) for layer in range(layers)] for step in range(len(used))] == [[codec] * layers for codec in used]
    assert [decision.codec for decision in one.decisions] == used


@settings(max_examples=100, deadline=None)
@given(runs, targets)
def test_the_codec_never_lies_below_what_the_last_step_asked_for(run, target):
    one = RateController(CANDIDATES, target)
    for step in run:
        one.update(step)
        last = one.decisions[-1]
        assert SIZES[last.codec] >= max(SIZES[last.fits], SIZES[last.meets])


@given(measurements)
def test_a_measurement_survives_the_way_through_integers(measurement):
    integers = measurement.to_integers()
    assert Measurement.from_integers(integers).to_integers() == integers and all(abs(value) < 2**63 for value in integers)


@pytest.mark.parametrize("values", [(0.0, 0, 0, 0), (1e6, -1, 0, 0), (1e6, 0, float("inf"), 0), (1e6, 0, 0, float("nan")), (1e6, 0, 0, "0")])
def test_what_was_not_measured_is_refused(values):
    with pytest.raises(UsageError):
        Measurement(*values)
    with pytest.raises(UsageError):
        controller().update([])


def test_candidates_not_worth_their_bytes_are_dropped():
    one = RateController([*CANDIDATES, Candidate("topk-8", 5_000, 0.2)], Target(1.0, 1.0))
    assert [candidate.codec for candidate in one.candidates] == ["int1", "int2", "int4", "int8"]
    with pytest.raises(UsageError, match="int1, int2, int4, int8"):
        RateController(CANDIDATES, Target(1.0, 1.0), start="topk-8")


@pytest.mark.parametrize("candidates", [[], [CANDIDATES[0]] * 2])
def test_no_candidates_and_the_same_twice_are_refused(candidates):
    with pytest.raises(UsageError, match="one or more"):
        RateController(candidates, Target(1.0, 1.0))


def test_targets_and_candidates_are_checked():
    for wrong in ({"time_budget_s": -1.0}, {"error_bound": float("nan")}, {"messages": 1.5}, {"overlap": 1.1}):
        with pytest.raises(UsageError):
            Target(**({"time_budget_s": 1.0, "error_bound": 0.1} | wrong))
    for wrong in (("int3", 1, 0.1), ("int4", -1, 0.1), ("int4", 1, float("inf"))):
        with pytest.raises(UsageError):
            Candidate(*wrong)
