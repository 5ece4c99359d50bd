"""Errors in calls that ranks share: who is answered, who goes on. The ranks here are words; see test_supervisor and test_modes for real ones."""

import json
from types import SimpleNamespace

import pytest
import torch

from dite.errors import ExchangeCorrupted, RankLost
from dite.server.agreement import _MAGIC, agreed, settle, told

ERROR = told(IndexError("index out of range"))


class Group:
    """A group whose other ranks have said `others`, each in 24 bytes."""

    def __init__(self, others=(), ended=False, fails=False):
        self.others, self.ended, self.fails = others, ended, fails

    def bytes_of(self, text):
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def all_gather(self, mine):
        if self.fails:
            raise RankLost("another rank was lost")
        self.said = bytes(mine.numpy())
        return [mine, *(self.bytes_of(one if isinstance(one, bytes) else self.said) for one in self.others)]

    def leave(self, reason):
        self.ended = True


def test_ranks_at_the_same_place_go_on_and_others_have_to_settle():
    assert agreed(Group(["the same"]), {"a": 3})
    assert not agreed(Group([_MAGIC + bytes(20)]), {"a": 3})
    assert not agreed(Group(ended=True), {}) and not agreed(Group(fails=True), {})


def test_a_rank_whose_others_are_in_a_call_leaves_as_they_will():
    group = Group([b"DTC1" + bytes(20)])
    assert not agreed(group, {"a": 3}) and group.ended


def rank(**changes):
    """What a rank says of two requests, each with five calls made."""
    said = {"drawing": ["a", "b"], "failed": {}, "finished": [], "at": {"a": 5, "b": 5}, "apart": [], "fault": False}
    return json.loads(json.dumps(said | changes))


def settled(mine, *others, broken=(), lost=None):
    """The verdict of rank 0, or of the one that says `mine` first."""
    shared = SimpleNamespace(broken=set(broken), rejoin=lambda document: [document, *others])
    engine = SimpleNamespace(lost=lost, at=mine["at"], apart=set(mine["apart"]))
    return settle(shared, engine, mine["drawing"], mine["failed"], mine["finished"])


def test_a_request_that_fails_on_one_rank_fails_and_its_neighbour_goes_on():
    verdict = settled(rank(), rank(failed={"a": ERROR}, at={"b": 5}), broken={"a"})
    assert (verdict.failed, verdict.again) == ({"a": ERROR}, [])


def test_the_rank_that_answers_has_the_first_word_on_an_error():
    verdict = settled(rank(failed={"a": ERROR}), rank(failed={"a": told(MemoryError("no memory"))}))
    assert verdict.failed["a"]["error"]["type"] == "IndexError"


@pytest.mark.parametrize("broken, at", [({"a", "b"}, 5), ({"a"}, 6)], ids=["cut short", "further on one rank"])
def test_a_neighbour_that_ranks_are_not_agreed_about_is_begun_anew(broken, at):
    verdict = settled(rank(failed={"a": ERROR}), rank(failed={"a": ERROR}, at={"b": at}), broken=broken)
    assert (list(verdict.failed), verdict.again) == (["a"], ["b"])


def test_pictures_that_the_answering_rank_has_are_delivered_whatever_others_say():
    verdict = settled(rank(finished=["a"], at={"b": 5}), rank(failed={"a": ERROR}, at={"b": 5}))
    assert (verdict.failed, verdict.finished, verdict.again) == ({}, ["a"], [])


def test_a_request_that_another_rank_has_forgotten_is_answered_and_not_begun_for_ever():
    verdict = settled(rank(), rank(drawing=["b"], failed={}, at={"b": 5}), broken={"a"})
    assert verdict.failed["a"]["error"]["type"] == "RankLost"


def test_calls_that_fail_together_are_made_apart():
    verdict = settled(rank(apart=["a", "b"]), rank(fault=True), lost=IndexError("one of them"))
    assert (verdict.failed, verdict.again, verdict.apart) == ({}, [], ["a", "b"])


def test_where_no_request_is_at_fault_the_ranks_end():
    with pytest.raises(ExchangeCorrupted):
        settled(rank(), rank(), broken={"a"}, lost=ExchangeCorrupted("a packet is damaged"))
    with pytest.raises(RankLost, match="lost each other"):
        settled(rank(), rank())


ONEDNN = [(RuntimeError("could not create a primitive"), True), (RuntimeError("could not create a primitive descriptor for a matmul"), False)]


@pytest.mark.parametrize("error, memory", [(MemoryError(), True), (RuntimeError("CUDA out of memory. Tried"), True), (KeyError("x"), False), *ONEDNN])
def test_what_is_told_of_an_error(error, memory):
    assert told(error)["memory"] is memory and told(error)["status"] == 500 and told(error)["error"]["type"] == type(error).__name__
