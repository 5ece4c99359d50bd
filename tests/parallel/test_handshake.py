"""Ranks that differ are told in what; changes to a live model are undone in order."""

import re

import pytest
import torch
from samples import build

from dite.errors import RanksDisagree
from dite.parallel.handshake import agree_on_call, description, shake_hands
from dite.parallel.hooks import Hooks
from dite.parallel.stream import Moment


class Group:
    """Rank 0 of two; what rank 1 would say is given."""

    members = (0, 1)

    def __init__(self, other):
        self.other = other

    def gather_json(self, mine):
        return [mine, self.other]

    def all_gather(self, packet):
        return [packet, self.other]

    def bytes_of(self, text):
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.fixture(scope="module")
def mine():
    return description(build("DiTTransformer2DModel"))


def test_equal_ranks_shake_hands(mine):
    shake_hands(Group(dict(mine)), mine)


def test_a_description_names_versions_decoder_model_bits_and_weights(mine):
    assert {"dite", "torch", "codec implementation", "model", "configuration", "layers and bits", "weights"} == set(mine)


@pytest.mark.parametrize("key", ["dite", "torch", "codec implementation", "model", "configuration", "layers and bits", "weights"])
def test_whichever_key_differs_is_named_with_both_values(mine, key):
    with pytest.raises(RanksDisagree, match=re.escape(f"{key}: other on rank 1, {mine[key]} on rank 0")):
        shake_hands(Group({**mine, key: "other"}), mine)


def test_a_rank_that_leaves_something_out_differs(mine):
    with pytest.raises(RanksDisagree, match="weights"):
        shake_hands(Group({key: value for key, value in mine.items() if key != "weights"}), mine)


def said(moment, layout):
    """What a rank at this call would send."""
    sent = []
    group = Group(None)
    group.all_gather = lambda packet: sent.append(packet) or [packet, packet]
    agree_on_call(group, moment, layout)
    return sent[0]


def test_ranks_at_the_same_call_agree():
    agree_on_call(Group(said(Moment(1, 0, 3, 9), 5)), Moment(1, 0, 3, 9), 5)


@pytest.mark.parametrize(
    "moment, layout, why",
    [
        (Moment(2, 0, 3, 9), 5, "request differ"),
        (Moment(1, 1, 3, 9), 5, "guidance branch differ"),
        (Moment(1, 0, 4, 9), 5, "step differ"),
        (Moment(1, 0, 3, 9), 6, "shapes differ"),
        (Moment(1, 0, 3, 8), 5, "other inputs"),
    ],
)
def test_ranks_at_different_calls_are_told_in_what_they_differ(moment, layout, why):
    with pytest.raises(RanksDisagree, match=why):
        agree_on_call(Group(said(moment, layout)), Moment(1, 0, 3, 9), 5)


class Thing(torch.nn.Module):
    def forward(self, x):
        return [*x, "forward"]


def test_hooks_run_in_place_and_are_undone_in_reverse_order():
    thing, hooks = Thing(), Hooks()
    hooks.replace(thing, "forward", lambda forward: lambda x: [*forward(x), "first"])
    hooks.replace(thing, "forward", lambda forward: lambda x: [*forward(x), "second"])
    hooks.before(thing, lambda args, kwargs: (([*args[0], "before"],), kwargs))
    hooks.after(thing, lambda output: [*output, "after"])
    assert thing([]) == ["before", "forward", "first", "second", "after"]
    hooks.undo()
    assert thing([]) == ["forward"] and "forward" not in vars(thing)


def test_an_objects_own_attribute_comes_back_as_it_was():
    thing, hooks = Thing(), Hooks()
    thing.forward = own = lambda x: ["own"]
    hooks.replace(thing, "forward", lambda forward: lambda x: [*forward(x), "more"])
    assert thing([]) == ["own", "more"]
    hooks.undo()
    assert thing.forward is own


def test_everything_is_undone_though_one_undoing_fails():
    thing, hooks = Thing(), Hooks()
    hooks.after(thing, lambda output: [*output, "after"])
    hooks.replace(thing, "forward", lambda forward: lambda x: ["replaced"])
    del thing.forward  # somebody else was here
    with pytest.raises(AttributeError):
        hooks.undo()
    assert thing([]) == ["forward"]
