"""Bytes per step and rank: the published figures, the written formulas, and what can't be split."""

from dataclasses import replace

import pytest

from dite.errors import UsageError
from dite.parallel.schedule import Rule, Schedule
from dite.parallel.traffic import Layout, bytes_per_image, check, exchange_bytes, layer_bytes, output_bytes, step_bytes
from dite.parallel.workload import WORKLOADS, Workload

FLUX = WORKLOADS["flux-1024"]
RAGGED = Workload("ragged", layers=3, tokens=17, width=96, heads=6, output_channels=8, compute_s=1.0, batch=2, value_bytes=4)


@pytest.mark.parametrize("mode, megabytes", [("kv_gather", 2421), ("ring", 2421), ("displaced", 2421), ("ulysses", 1210), ("pipefusion", 28)])
def test_flux_on_four_ranks_sends_what_the_paper_says(mode, megabytes):
    assert round(exchange_bytes(FLUX, Layout(mode, ranks=4, header_bytes=0)) / 1e6) == megabytes


def test_a_gather_of_ragged_shares_pads_them_and_counts_headers():
    # 17 tokens on 4 ranks: 5 each; K and V of 2 samples, whose β take a word; rows of 96 are two groups of 64 in int4.
    assert layer_bytes(RAGGED, Layout("kv_gather", ranks=4)) == 3 * 2 * (48 + 2 * 5 * 96 * 4)
    assert layer_bytes(RAGGED, Layout("ring", "int4", ranks=4)) == 3 * 2 * (48 + 4 + 2 * 5 * 2 * 34)
    assert output_bytes(RAGGED, Layout("ring", "int4", ranks=4)) == 3 * (48 + 2 * 5 * 8 * 4)


def test_packets_end_on_words():
    odd = replace(RAGGED, tokens=3, width=6, heads=1, batch=1, value_bytes=2)
    assert layer_bytes(odd, Layout("pipefusion", ranks=3, patches=3)) == 3 * (48 + 12)
    assert layer_bytes(replace(odd, width=7), Layout("pipefusion", ranks=3, patches=3)) == 3 * (48 + 16)


def test_ulysses_sends_slices_of_the_width_there_and_back():
    # 3 ranks: 6 tokens each, 32 of 96 columns: one short group
    assert layer_bytes(RAGGED, Layout("ulysses", "int8", ranks=3)) == 2 * 4 * (48 + 4 + 2 * 6 * 66)


def test_the_busiest_rank_of_a_pipeline_sends_patches_or_the_output():
    patches = 5 * (48 + 4 + 2 * 4 * 2 * 34)
    assert step_bytes(RAGGED, Layout("pipefusion", "int4", ranks=2, patches=5)) == patches
    wordy = replace(RAGGED, output_channels=96)
    assert step_bytes(wordy, Layout("pipefusion", "int4", ranks=2, patches=5)) == 48 + 2 * 17 * 96 * 4


def test_the_first_step_is_in_int8_and_counts():
    layout = Layout("kv_gather", "int1", ranks=4)
    first, rest = step_bytes(RAGGED, layout, first=True), step_bytes(RAGGED, layout)
    assert first == step_bytes(RAGGED, replace(layout, codec="int8", order=0)) > 2 * rest
    assert bytes_per_image(RAGGED, layout, 10) == first + 9 * rest
    raw = Layout("kv_gather", ranks=4)
    assert bytes_per_image(RAGGED, raw, 10) == 10 * step_bytes(RAGGED, raw)


def test_cfg_groups_halve_the_batch_and_swap_their_outputs():
    swap = 48 + 17 * 8 * 4
    assert step_bytes(RAGGED, Layout("one_device", ranks=2, cfg=True)) == swap
    assert step_bytes(RAGGED, Layout("ring", ranks=4, cfg=True)) == step_bytes(replace(RAGGED, batch=1), Layout("ring", ranks=2)) + swap


def test_one_device_sends_nothing():
    assert bytes_per_image(RAGGED, Layout("one_device"), 50) == 0


def test_a_schedule_takes_the_place_of_the_codec():
    layout = Layout("kv_gather", "int4", ranks=2)
    assert bytes_per_image(RAGGED, layout, 9, Schedule.constant("int2")) == bytes_per_image(RAGGED, replace(layout, codec="int2"), 9)
    mixed = Schedule.from_rules("int4", [Rule("4-", "0", "int8")])
    extra = layer_bytes(RAGGED, replace(layout, codec="int8")) - layer_bytes(RAGGED, layout)
    assert bytes_per_image(RAGGED, layout, 9, mixed) == bytes_per_image(RAGGED, layout, 9) + 5 * extra
    with pytest.raises(UsageError, match="pipefusion"):
        bytes_per_image(RAGGED, Layout("pipefusion", ranks=2), 9, mixed)
    with pytest.raises(UsageError, match="for 2 layers"):
        bytes_per_image(RAGGED, layout, 1, Schedule.from_table([["int4", "int4"]]))


@pytest.mark.parametrize("order", [1, 2])
def test_the_budget_and_the_formulas_count_the_same_bytes(order):
    from dite.parallel.budget import Profile, allocate
    from dite.parallel.rates import SQUARED_ERRORS

    profile = Profile([[1.0, 2.0, step / 3] for step in range(8)], [(2 * 2 * 9, 96)] * 3, 2)
    found = allocate(profile, 100_000, SQUARED_ERRORS[order], header_bytes=2 * 48)  # K and V have one each
    layout = Layout("kv_gather", "int4", ranks=2, order=1)
    assert found.sent_bytes + 8 * output_bytes(RAGGED, layout) == bytes_per_image(RAGGED, layout, 8, found.schedule)


@pytest.mark.parametrize(
    "layout, said",
    [
        ({"mode": "gather", "ranks": 2}, "no mode named 'gather'"),
        ({"mode": "pipe_fusion", "ranks": 2}, "did you mean pipefusion"),
        ({"mode": "ring"}, "on a group of 1 rank\n"),
        ({"mode": "one_device", "ranks": 2}, "on a group of 2 ranks"),
        ({"mode": "ring", "ranks": 3, "cfg": True}, "must be even"),
        ({"mode": "ring", "codec": "int3", "ranks": 2}, "no codec"),
        ({"mode": "ring", "ranks": 0}, "ranks is 0"),
        ({"mode": "ulysses", "ranks": 4}, "ulysses degree 4 must divide num_heads 6\nuse 1, 2, 3, 6"),
        ({"mode": "pipefusion", "ranks": 4}, "only 3 layers"),
        ({"mode": "pipefusion", "ranks": 2, "patches": 18}, "only 17 tokens"),
        ({"mode": "kv_gather", "ranks": 18}, "only 17 tokens"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(layout, said):
    with pytest.raises(UsageError, match=said):
        check(RAGGED, Layout(**layout))


def test_an_odd_batch_has_no_two_branches():
    with pytest.raises(UsageError, match="batch of 1"):
        check(FLUX, Layout("ring", ranks=4, cfg=True))


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"heads": 5}, {"fixed_s": 2.0}, {"attention_share": 1.5}, {"output_tokens": 18}, {"compute_s": float("nan")}]
)
def test_a_workload_is_checked(wrong):
    with pytest.raises(UsageError):
        replace(RAGGED, **wrong)
