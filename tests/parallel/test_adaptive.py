"""codec="auto": decisions from what was seen, without other ranks; real ones are in test_modes."""

from types import SimpleNamespace

import pytest
import torch

from dite.parallel import adaptive
from dite.parallel.adaptive import Adaptive
from dite.parallel.codecs import Reference
from dite.parallel.group import Traffic
from dite.parallel.stream import Moment


class Lonely:
    """A group of one whose exchanges take `seconds` a step."""

    def __init__(self):
        self.traffic = Traffic()

    def all_gather(self, tensor):
        return [tensor]

    def broadcast(self, tensor, source):
        pass

    def barrier(self):
        pass


@pytest.fixture
def steps(monkeypatch):
    """Draw an image of 10 steps, each computing 0.1 s and waiting `waited` for the link; returns the codecs."""
    clock = [0.0]
    monkeypatch.setattr(adaptive.time, "perf_counter", lambda: clock[0])

    def run(waited, change):
        group = Lonely()
        watch = Adaptive(group, layers=3)
        value = torch.ones(2, 64, 128)
        stream = SimpleNamespace(reference=Reference(value, change * value), value=value)
        for step in range(10):
            moment = Moment(1, 0, step)
            watch.begin(moment)
            clock[0] += 0.1 + waited
            group.traffic.add(sent=10**6, raw=4 * 10**6)
            group.traffic.seconds += waited
            watch.after(moment, [stream])
        return watch, [watch.codec_of(step, 0) for step in range(10)]

    return run


def test_a_link_with_time_to_spare_gets_more_bits(steps):
    assert steps(waited=0.001, change=0.1)[1][-1] == "int8"


def test_a_slow_link_gets_fewer_bits_while_little_changes(steps):
    assert steps(waited=1.0, change=0.01)[1][-1] == "int1"


def test_the_error_bound_wins_over_a_slow_link(steps):
    assert steps(waited=1.0, change=0.2)[1][-1] == "int4"


def test_the_first_steps_are_always_the_same(steps):
    assert steps(waited=0.001, change=0.1)[1][:2] == steps(waited=1.0, change=0.01)[1][:2] == ["int4", "int4"]


def test_what_was_decided_is_a_schedule(steps):
    watch, codecs = steps(waited=1.0, change=0.01)
    assert [watch.schedule().codec(step, 2) for step in range(10)] == codecs


def test_another_request_begins_anew(steps):
    watch, _ = steps(waited=1.0, change=0.01)
    watch.begin(Moment(2, 0, 0))
    assert watch.codec_of(1, 0) == "int4"
