"""Calls are joined where nothing but their rows differs, and cut apart again."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dite.server.merge import Call, alike, join, run, take


def call(rows, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 6, 6, generator=generator)
    arguments = {
        "hidden_states": x,
        "timestep": torch.full((rows,), seed),
        "added": {"size": torch.randn(rows, 2, generator=generator), "none": None},
    }
    return Call.of(arguments | {"img_ids": torch.arange(6).reshape(2, 3), "return_dict": False} | changes)


def model(hidden_states, timestep, added, img_ids, return_dict):
    return (hidden_states * timestep[:, None, None, None] + added["size"].sum(1)[:, None, None, None],)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.none() | st.integers(1, 5))
def test_joined_calls_give_each_its_own_rows(counts, micro_batch):
    calls = [call(rows, seed) for seed, rows in enumerate(counts)]
    for one, result in zip(calls, run(model, calls, micro_batch), strict=True):
        assert torch.equal(result[0], model(**one.arguments)[0])


def test_every_forward_of_a_fixed_size_is_made_as_a_part_of_the_call():
    parts = []
    run(model, [call(3), call(2, 1)], 2, lambda part: contextlib.nullcontext(parts.append(part)))
    run(model, [call(3)], None, lambda part: contextlib.nullcontext(parts.append("none")))
    assert parts == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_states": torch.zeros(2, 4, 8, 8)},
        {"hidden_states": torch.zeros(2, 4, 6, 6, dtype=torch.bfloat16)},
        {"img_ids": torch.ones(2, 3)},
        {"img_ids": torch.arange(1, 7).reshape(2, 3)},
        {"return_dict": True},
        {"added": {"size": torch.zeros(2, 3), "none": None}},
        {"added": {"size": torch.zeros(2, 2), "none": 1}},
        {"more": 1},
    ],
)
def test_calls_that_differ_in_more_than_their_rows_are_not_joined(changes):
    assert not alike(call(2), call(2, **changes)) and not alike(call(2, **changes), call(2))


def test_positions_are_shared_even_where_there_are_as_many_as_rows():
    assert torch.equal(join([call(2), call(2, 1)]).arguments["img_ids"], torch.arange(6).reshape(2, 3))


def test_a_timestep_without_rows_must_be_the_same():
    one, other = call(2, timestep=torch.tensor(5)), call(2, 1, timestep=torch.tensor(6))
    assert alike(one, call(3, 1, timestep=torch.tensor(5))) and not alike(one, other)


def test_rows_are_taken_by_number_and_may_come_twice():
    taken = take(call(3, 7), torch.tensor([2, 2]))
    assert taken.rows == 2 and torch.equal(taken.arguments["hidden_states"][0], call(3, 7).arguments["hidden_states"][2])
    assert taken.arguments["img_ids"].shape == (2, 3)
