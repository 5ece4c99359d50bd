"""Bytes are spent where the change is: never more than the budget, and nearly as well as by trying everything."""

import json
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import UsageError
from dite.parallel.budget import Profile, allocate
from dite.parallel.rates import SQUARED_ERRORS, payload_bytes

shapes = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([32, 64, 100])), min_size=1, max_size=2)
profiles = st.builds(
    lambda shapes, steps, values: Profile([values[step * len(shapes) : (step + 1) * len(shapes)] for step in range(steps)], shapes, 3),
    shapes,
    st.integers(1, 3),
    st.lists(st.floats(0, 100), min_size=6, max_size=6),
)
errors = st.dictionaries(st.sampled_from(["none", "int8", "int4", "int2", "int1", "topk-8"]), st.floats(0, 3), min_size=1, max_size=4)


def sent(profile, layer, codec):
    return (profile.ranks - 1) * (48 + payload_bytes(codec, *profile.shapes[layer]))


def sums(profile, squared_errors, rows):
    """Bytes and error of rows of codecs for the steps after the keyframe."""
    pairs = zip(rows, profile.energy[1:], strict=True)
    cells = [(layer, codec, energies[layer]) for row, energies in pairs for layer, codec in enumerate(row)]
    keyframe = sum(sent(profile, layer, "int8") for layer in range(len(profile.shapes)))
    return keyframe + sum(sent(profile, layer, codec) for layer, codec, _ in cells), sum(squared_errors[codec] * energy for _, codec, energy in cells)


def every_choice(profile, squared_errors):
    rows = list(product(squared_errors, repeat=len(profile.shapes)))
    return [sums(profile, squared_errors, choice) for choice in product(rows, repeat=len(profile.energy) - 1)]


@settings(max_examples=150, deadline=None)
@given(profiles, errors, st.floats(0, 1.1))
def test_no_choice_beats_it_by_more_than_one_upgrade(profile, squared_errors, share):
    choices = every_choice(profile, squared_errors)
    least, most = min(choices)[0], max(choices)[0]
    budget = least + int(share * (most - least))
    best = min(error for size, error in choices if size <= budget)
    found = allocate(profile, budget, squared_errors)
    upgrade = max((max(row) for row in profile.energy[1:]), default=0.0) * (max(squared_errors.values()) - min(squared_errors.values()))
    assert found.sent_bytes <= budget
    assert found.least_error <= best + 1e-9 and best <= found.error + 1e-9
    assert found.error <= found.least_error + upgrade + 1e-9


@settings(max_examples=100, deadline=None)
@given(profiles, errors)
def test_what_it_says_of_its_schedule_is_true(profile, squared_errors):
    found = allocate(profile, 10**6, squared_errors)
    layers = range(len(profile.shapes))
    rows = [[found.schedule.codec(step, layer) for layer in layers] for step in range(1, len(profile.energy))]
    size, error = sums(profile, squared_errors, rows)
    assert found.sent_bytes == size and found.error == pytest.approx(error) and found.least_error == pytest.approx(error)
    assert {found.schedule.codec(0, layer) for layer in layers} == {"int8"}


def test_an_upgrade_is_not_taken_before_the_one_below_it():
    # int1 → int8 is 56 bytes more and doesn't fit; int8 → topk-2 is 30 bytes more and would
    profile = Profile([[1.0], [1.0]], [(1, 64)], 2)
    found = allocate(profile, 48 + 66 + 48 + 10 + 40, {"int1": 1.0, "int8": 0.1, "topk-2": 0.08})
    assert found.schedule.codec(1, 0) == "int1" and found.sent_bytes == 48 + 66 + 48 + 10


def test_the_bound_is_that_of_a_codec_split_in_two():
    found = allocate(Profile([[1.0], [1.0]], [(1, 64)], 2), 48 + 66 + 48 + 10 + 28, {"int1": 1.0, "int8": 0.1})
    assert found.error == 1.0 and found.least_error == pytest.approx(0.55)


def test_bits_go_where_the_change_is():
    profile = Profile([[1.0, 1.0]] + [[0.01, 0.02]] * 3 + [[5.0, 9.0]] * 3, [(64, 64)] * 2, 2)
    everything_int2 = 7 * 2 * 48 + 2 * 64 * 66 + 6 * 2 * 64 * 18
    found = allocate(profile, everything_int2, SQUARED_ERRORS[2])
    early, late = (sum(payload_bytes(found.schedule.codec(step, layer), 64, 64) for layer in (0, 1)) for step in (1, 6))
    assert early < late
    assert found.error < 0.5 * sum(map(sum, profile.energy[1:])) * SQUARED_ERRORS[2]["int2"]


def test_more_bytes_never_err_more():
    profile = Profile([[float(1 + (7 * step + layer) % 5) for layer in range(4)] for step in range(10)], [(16, 100)] * 4, 4)
    least = 3 * 4 * (10 * 48 + 16 * 132 + 9 * 16 * 20)
    found = [allocate(profile, least + extra * 5_000) for extra in range(40)]
    assert all(a.error + 1e-12 >= b.error for a, b in pairwise(found)) and found[-1].error < found[0].error / 10


def test_a_codec_that_sends_more_and_errs_more_is_never_used():
    found = allocate(Profile([[1.0]] * 9, [(4, 64)], 2), 10_000, {"int4": 0.01, "int2": 0.1, "int8": 0.02})
    assert "int8" not in {found.schedule.codec(step, 0) for step in range(1, 9)}


def test_too_small_a_budget_says_the_least_that_works():
    profile = Profile([[1.0, 1.0]] * 5, [(3, 100)] * 2, 4)
    with pytest.raises(UsageError) as caught:
        allocate(profile, 100)
    least = 3 * 2 * (5 * 48 + 3 * 132 + 4 * 3 * 20)
    assert f"{least} bytes" in str(caught.value) and "5 steps × 2 layers" in caught.value.why
    assert allocate(profile, least).sent_bytes == least
    with pytest.raises(UsageError):
        allocate(profile, least - 1)


def test_the_same_profile_gives_the_same_schedule():
    profile = Profile([[1.0] * 6] * 20, [(8, 64)] * 6, 2)  # ties everywhere
    assert len({allocate(Profile.from_json(profile.to_json()), 150_000).schedule.digest for _ in range(3)}) == 1


@settings(max_examples=50, deadline=None)
@given(profiles)
def test_a_profile_is_what_it_was_after_json(profile):
    again = Profile.from_json(profile.to_json())
    assert again == profile and again.to_json() == profile.to_json()


def test_a_profile_knows_its_elements_and_lies_in_a_file(tmp_path):
    profile = Profile([[1, 2.5]], [(3, 100), (1, 7)], 2)
    profile.write(tmp_path / "profile.json")
    assert profile.elements == (300, 7) and Profile.read(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 1},
        {"ranks": 2.0},
        {"shapes": []},
        {"shapes": [[1, 0]]},
        {"shapes": [[1]]},
        {"shapes": [[1, 2, 3]]},
        {"shapes": "ab"},
        {"energy": [[1.0, 2.0]]},
        {"energy": [[-1.0]]},
        {"energy": [["1"]]},
        {"energy": [[True]]},
        {"energy": []},
        {"energi": []},
    ],
)
def test_what_is_no_profile_is_refused(change):
    with pytest.raises(UsageError):
        Profile.from_json(json.dumps({"energy": [[1.0]], "shapes": [[1, 64]], "ranks": 2} | change))


def test_overflowing_energy_and_codecs_without_errors_are_refused():
    with pytest.raises(UsageError):
        Profile.from_json('{"energy": [[1e999]], "shapes": [[1, 64]], "ranks": 2}')
    for squared_errors in ({}, {"int9": 0.1}, {"int4": float("nan")}, {"int4": -1.0}):
        with pytest.raises(UsageError):
            allocate(Profile([[1.0]], [(1, 64)], 2), 1000, squared_errors)
