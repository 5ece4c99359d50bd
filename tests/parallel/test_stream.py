"""A stream's sender and receivers hold the same bits, whatever is sent through it."""

import copy
from dataclasses import replace

import pytest
import torch

from dite.errors import ExchangeCorrupted, NonFiniteOutput, UsageError
from dite.parallel.codecs import codec
from dite.parallel.packet import HEADER_BYTES
from dite.parallel.stream import ADAPTIVE, Moment, Name, Predictor, ResidualStream

CODECS = ("none", "int8", "int4", "int2", "int1", "lowrank-4", "topk-4")
PREDICTORS = [Predictor(0), Predictor(1), Predictor(2, 0.5), Predictor(2, 1.0), Predictor(2, ADAPTIVE)]


def walk(steps, shape=(2, 5, 70), seed=0, smooth=0.7):
    """A tensor that changes a little each step, in a direction that changes slowly."""
    generator = torch.Generator().manual_seed(seed)
    x, drift = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    for _ in range(steps):
        yield x
        drift = smooth * drift + (1 - smooth**2) ** 0.5 * torch.randn(shape, generator=generator)
        x = x + 0.05 * drift


def ends(predictor, shape=(2, 5, 70), dtype=torch.float32):
    """A sender, and a receiver that keeps the same in a part of a larger tensor."""
    whole = torch.zeros(shape[0], shape[1] + 4, shape[2] + 6, dtype=dtype)
    view = whole[:, 1 : 1 + shape[1], 2 : 2 + shape[2]]
    return [ResidualStream(Name(3, 1, 0), value, predictor) for value in (torch.zeros(shape, dtype=dtype), view)]


def send(streams, x, name, step):
    chosen = codec(name)
    packet = torch.zeros(streams[0].packet_bytes(chosen), dtype=torch.uint8)
    streams[0].encode(x, chosen, Moment(1, 0, step), packet)
    for stream in streams:
        stream.decode_(packet, chosen, Moment(1, 0, step))
    return packet


def errors(predictor, name, steps=30, **path):
    streams, found = ends(predictor), []
    for step, x in enumerate(walk(steps, **path)):
        send(streams, x, name, step)
        found.append(float((streams[1].value - x).norm() / x.norm()))
    return found


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_both_ends_are_bit_equal_over_fifty_steps(name, predictor):
    for seed in range(2):
        streams = ends(predictor)
        for step, x in enumerate(walk(50, seed=seed)):
            send(streams, x, name, step)
            assert streams[0].digest() == streams[1].digest(), step


@pytest.mark.parametrize("name", ["int4", "int1", "topk-4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ends_are_bit_equal_in_half_precision(name, dtype):
    streams = ends(Predictor(), dtype=dtype)
    for step, x in enumerate(walk(20)):
        send(streams, x.to(dtype), name, step)
    assert streams[0].digest() == streams[1].digest()
    assert float((streams[0].value.float() - x).norm() / x.norm()) < 0.1


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_sending_changes_is_better_than_values_and_a_prediction_better_still(name):
    values, changes, predicted = (sum(errors(Predictor(order), name)[5:]) for order in (0, 1, 2))
    assert predicted < changes < values / 2


def test_errors_do_not_accumulate():
    found = errors(Predictor(2), "int2", steps=200)
    assert max(found[150:]) < 2 * max(found[10:60])


def test_the_adaptive_damping_follows_the_data():
    def of(smooth):
        return {damping: sum(errors(Predictor(2, damping), "int4", smooth=smooth)) for damping in (0.0, 1.0, ADAPTIVE)}

    straight, random = of(0.97), of(0.0)
    assert straight[1.0] < straight[0.0] and random[0.0] < random[1.0]
    assert straight[ADAPTIVE] < 1.1 * straight[1.0] and random[ADAPTIVE] < 1.1 * random[0.0]


def test_the_first_packet_is_an_int8_keyframe_whatever_the_codec():
    streams, sizes = ends(Predictor()), []
    for step, x in enumerate(walk(3)):
        sizes.append(len(send(streams, x, "int1", step)))
    assert sizes[0] == HEADER_BYTES + codec("int8").body_bytes((2, 5, 70), torch.float32)
    assert sizes[1] == sizes[2] == HEADER_BYTES + 4 + codec("int1").body_bytes((2, 5, 70), torch.float32)  # 4: β of two samples, in whole words


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_nothing_changing_gives_no_nan(name, predictor):
    streams, x = ends(predictor), torch.zeros(2, 5, 70)
    for step in range(4):
        send(streams, x, name, step)
    assert torch.equal(streams[1].value, x)


def test_order_zero_forgets_what_was_before():
    streams, fresh = ends(Predictor(0)), ends(Predictor(0))
    for step, last in enumerate(walk(5)):
        send(streams, last, "int4", step)
    send(fresh, torch.ones(2, 5, 70), "int4", 0)
    send(streams, last, "int4", 5)
    send(fresh, last, "int4", 1)
    assert torch.equal(streams[1].value, fresh[1].value)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_only_decoding_changes_what_a_sender_remembers(name, predictor):
    streams, chosen = ends(predictor), codec(name)
    send(streams, torch.ones(2, 5, 70), name, 0)
    before = streams[0].digest()
    streams[0].encode(torch.zeros(2, 5, 70), chosen, Moment(1, 0, 1), torch.zeros(streams[0].packet_bytes(chosen), dtype=torch.uint8))
    assert streams[0].digest() == before


def test_a_receiver_whose_reference_differs_notices_within_four_steps():
    streams = ends(Predictor())
    frames = list(walk(6))
    send(streams, frames[0], "int4", 0)
    streams[1].value[0, 0, 0] += 1e-3
    with pytest.raises(ExchangeCorrupted, match="reference of layer 3 differs"):
        for step in range(1, 5):
            send(streams, frames[step], "int4", step)


@pytest.mark.parametrize("name", CODECS)
def test_nan_of_a_sender_is_refused_by_receivers_and_leaves_them_as_they_were(name):
    streams = ends(Predictor())
    send(streams, torch.ones(2, 5, 70), name, 0)
    before = copy.deepcopy(streams[1].value)
    with pytest.raises(NonFiniteOutput, match="rank 0"):
        send(streams[::-1], torch.full((2, 5, 70), torch.nan), name, 1)
    assert torch.equal(streams[1].value, before)


@pytest.mark.parametrize("change", [{"epoch": 2}, {"branch": 1}, {"step": 2}])
def test_a_packet_of_another_moment_is_refused(change):
    streams, chosen = ends(Predictor()), codec("int4")
    packet = torch.zeros(streams[0].packet_bytes(chosen), dtype=torch.uint8)
    streams[0].encode(torch.ones(2, 5, 70), chosen, Moment(1, 0, 1), packet)
    with pytest.raises(ExchangeCorrupted, match=next(iter(change))):
        streams[1].decode_(packet, chosen, replace(Moment(1, 0, 1), **change))


@pytest.mark.parametrize("order, damping", [(3, ADAPTIVE), (-1, 0.5), (2, 1.5), (2, -0.1), (2, "much"), (2, float("nan"))])
def test_predictors_that_are_none_are_refused(order, damping):
    with pytest.raises(UsageError):
        Predictor(order, damping)
