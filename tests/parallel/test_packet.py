"""A packet that isn't exactly what is expected here and now is never opened."""

from dataclasses import replace

import pytest
import torch

from dite.errors import ExchangeCorrupted, RanksDisagree
from dite.parallel.packet import DIGEST, HEADER_BYTES, KEYFRAME, NONFINITE, Header, open_packet, seal

HEADER = Header(codec=3, order=2, flags=0, dtype=0, epoch=7, step=5, branch=1, layer=11, role=1, rank=2, rows=16, columns=63, inputs=0xABCD)


def packet(header=HEADER, size=33, space=0):
    made = torch.arange(HEADER_BYTES + size + space, dtype=torch.uint8)
    seal(made, replace(header, length=size))
    return made


def test_what_is_sealed_is_opened():
    header, body = open_packet(packet(replace(HEADER, flags=DIGEST | NONFINITE, digest=2**63 + 5)), HEADER)
    assert header.digest == 2**63 + 5 and header.flags == DIGEST | NONFINITE
    assert body.tolist() == list(range(HEADER_BYTES, HEADER_BYTES + 33))


def test_an_empty_body_and_space_behind_a_body_are_fine():
    assert len(open_packet(packet(size=0), HEADER)[1]) == 0
    assert len(open_packet(packet(size=8, space=5), HEADER)[1]) == 8


@pytest.mark.parametrize("name", ["codec", "order", "dtype", "epoch", "step", "branch", "layer", "role", "rank", "rows", "columns"])
def test_every_field_that_differs_is_named(name):
    with pytest.raises(ExchangeCorrupted, match=f"{name} is {getattr(HEADER, name) + 1}, not {getattr(HEADER, name)}"):
        open_packet(packet(replace(HEADER, **{name: getattr(HEADER, name) + 1})), HEADER)


def test_a_keyframe_where_none_is_due_is_refused():
    with pytest.raises(ExchangeCorrupted, match="keyframe"):
        open_packet(packet(replace(HEADER, flags=KEYFRAME)), HEADER)
    with pytest.raises(ExchangeCorrupted, match="keyframe"):
        open_packet(packet(), replace(HEADER, flags=KEYFRAME))


def test_other_inputs_are_the_users_mistake_and_not_damage():
    with pytest.raises(RanksDisagree, match="0000abce and 0000abcd"):
        open_packet(packet(replace(HEADER, inputs=0xABCE)), HEADER)


def test_every_single_flipped_bit_is_noticed():
    whole = packet(size=9)
    for bit in range(8 * len(whole)):
        damaged = whole.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ExchangeCorrupted):
            open_packet(damaged, HEADER)


@pytest.mark.parametrize("kept", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 32])
def test_a_packet_cut_short_is_refused(kept):
    with pytest.raises(ExchangeCorrupted):
        open_packet(packet()[:kept], HEADER)


@pytest.mark.parametrize("length", [0, 32, 34, 2**31, 2**32 - 1])
def test_a_lie_about_the_length_is_refused(length):
    lying = packet()
    lying[32:36] = torch.frombuffer(bytearray(length.to_bytes(4, "little")), dtype=torch.uint8)
    with pytest.raises(ExchangeCorrupted):
        open_packet(lying, HEADER)
