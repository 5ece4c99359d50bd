"""Modes as they are written, and who does what in them."""

from itertools import pairwise

import pytest

from dite.errors import UsageError
from dite.parallel.topology import MODES, Topology, bounds, parse


@pytest.mark.parametrize(
    "text, degree, expected",
    [
        ("kv_gather", 3, Topology(1, "kv_gather", 3)),
        ("ring", 4, Topology(1, "ring", 4, 1, 4)),
        ("ulysses", 4, Topology(1, "ulysses", 4, 4, 1)),
        ("cfg", 2, Topology(2)),
        ("cfg3", 3, Topology(3)),
        ("cfg+displaced", 6, Topology(2, "displaced", 3)),
        ("ulysses+ring", 8, Topology(1, "ulysses+ring", 8, 2, 4)),
        ("ring2+ulysses", 8, Topology(1, "ulysses+ring", 8, 4, 2)),
        ("cfg+ulysses2+ring", 8, Topology(2, "ulysses+ring", 4, 2, 2)),
        ("kv_gather", 1, Topology()),
    ],
)
def test_modes_and_products_are_read(text, degree, expected):
    assert parse(text, degree) == expected


@pytest.mark.parametrize(
    "text, degree, why",
    [
        ("rin", 2, "did you mean ring"),
        ("", 2, "no mode ''"),
        ("ring+ring", 4, "twice"),
        ("cfg", 4, "cfg alone uses 2"),
        ("cfg+ring", 3, "use 2 ranks"),
        ("ring+kv_gather", 4, "no product"),
        ("ring3", 4, "1 × 3 = 3"),
        ("ulysses3+ring2", 8, "1 × 3 × 2 = 6"),
        ("ring", 0, "1 to 128"),
        ("ring", 129, "1 to 128"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(text, degree, why):
    with pytest.raises(UsageError, match=why):
        parse(text, degree)


@pytest.mark.parametrize("text", ["ulysses0", "cfg0+ring", "ring0+ulysses"])
def test_a_degree_of_zero_is_refused(text):
    with pytest.raises(UsageError):
        parse(text, 4)


@pytest.mark.parametrize("mode", [*MODES, "cfg+ring", "ulysses+ring", "cfg+ulysses2+ring2"])
def test_groups_of_each_kind_hold_every_rank_once(mode):
    topology = parse(mode, 2 if mode == "cfg" else 8)
    for groups in (topology.token_groups(), topology.cfg_groups(), topology.ulysses_groups(), topology.ring_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world))


def test_neighbours_exchange_heads_and_the_same_heads_go_round():
    topology = parse("cfg+ulysses2+ring2", 8)
    assert topology.ulysses_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.ring_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.cfg_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]] and topology.token_group(6) == [4, 5, 6, 7]


@pytest.mark.parametrize("count, parts", [(7, 3), (3, 3), (1, 4), (500, 7)])
def test_shares_follow_each_other_and_differ_by_one_at_most(count, parts):
    shares = bounds(count, parts)
    sizes = [last - first for first, last in shares]
    assert shares[0][0] == 0 and shares[-1][1] == count and all(one[1] == two[0] for one, two in pairwise(shares))
    assert max(sizes) - min(sizes) <= 1 and sorted(sizes, reverse=True) == sizes
