"""The cost model: identities that must hold, the paper's latencies, and a choice that says why."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import UsageError
from dite.parallel.choice import Terms, choose
from dite.parallel.cost import ASSUMED_GPU_SPEEDS, CodecSpeed, image_seconds, predict
from dite.parallel.traffic import MODES, Layout, exchange_bytes, output_bytes
from dite.parallel.workload import LINKS, WORKLOADS, Link, Workload

FLUX = WORKLOADS["flux-1024"]
SMALL = Workload(
    "small", layers=4, tokens=16, width=64, heads=4, output_channels=4, compute_s=0.8, batch=2, value_bytes=4, attention_share=0.25, fixed_s=0.1
)
FREE = Link("free", 1e15, 0.0)
# Seconds for 28 steps of FLUX on 4 cards by MB/s (arXiv 2507.17511)
PAPER = {
    500: {"ring": 136.5, "kv_gather": 141.6, "ulysses": 75.6, "displaced": 139.7, "pipefusion": 12.4},
    1000: {"ring": 76.1, "kv_gather": 79.5, "ulysses": 46.5, "displaced": 78.7, "pipefusion": 12.4},
    2000: {"ring": 44.4, "kv_gather": 43.4, "ulysses": 30.7, "displaced": 42.2, "pipefusion": 12.4},
}


def flux_seconds(bandwidth_mb: float, mode: str, codec: str = "none") -> float:
    return image_seconds(FLUX, Link("", bandwidth_mb * 1e6, 15e-6), Layout(mode, codec, 4, patches=4), 28)


@pytest.mark.parametrize("bandwidth", PAPER)
def test_the_papers_latencies_are_predicted_within_a_quarter(bandwidth):
    ratios = {mode: flux_seconds(bandwidth, mode) / seconds for mode, seconds in PAPER[bandwidth].items()}
    assert {mode: ratio for mode, ratio in ratios.items() if not 0.75 < ratio < 1.25} == {}


@pytest.mark.parametrize("bandwidth", PAPER)
def test_raw_modes_come_in_the_papers_order_on_slow_links(bandwidth):
    # ring, gather and displaced lie within 6% of each other there, and change places from row to row: no order among these is claimed
    slow = [flux_seconds(bandwidth, mode) for mode in ("ring", "kv_gather", "displaced")]
    assert flux_seconds(bandwidth, "pipefusion") < flux_seconds(bandwidth, "ulysses") < min(slow)


def test_on_a_fast_link_the_pipelines_bubbles_make_it_the_slowest():
    seconds = {mode: flux_seconds(20_000, mode) for mode in PAPER[500]}
    assert max(seconds, key=seconds.get) == "pipefusion" and max(seconds.values()) < 28.06


def test_one_bit_gather_lies_between_pipefusion_and_ulysses_on_the_slowest_link():
    # At 1000 and 2000 MB/s the paper measures 15.7 and 13.9 s where this predicts less: its keyframe is raw and its codec takes time.
    assert flux_seconds(500, "pipefusion") < flux_seconds(500, "kv_gather", "int1") < flux_seconds(500, "ulysses")
    assert flux_seconds(500, "kv_gather", "int1") == pytest.approx(20.9, rel=0.1)


links = st.builds(Link, st.just(""), st.floats(1e3, 1e12), st.floats(0, 0.01), st.booleans())
layouts = st.one_of(
    st.builds(Layout, st.sampled_from(MODES[1:]), st.sampled_from(["none", "int8", "int4", "int1", "topk-8", "lowrank-2"]), st.sampled_from([2, 4])),
    st.builds(lambda mode, patches: Layout(mode, "int4", 4, True, patches), st.sampled_from(MODES[1:]), st.integers(0, 8)),
    st.just(Layout("one_device")),
    st.just(Layout("one_device", ranks=2, cfg=True)),
)


@settings(max_examples=200, deadline=None)
@given(links, layouts, st.booleans())
def test_the_parts_of_a_prediction_add_up(link, layout, first):
    step = predict(SMALL, link, layout, first, {"int4": CodecSpeed(3.0, 2.0)})
    assert step.seconds == pytest.approx(step.compute_s + step.codec_s + step.exposed_s)
    assert step.exchange_s == pytest.approx(step.hidden_s + step.exposed_s) and min(step.hidden_s, step.exposed_s, step.codec_s) >= 0


@settings(max_examples=100, deadline=None)
@given(links, layouts)
def test_a_faster_link_never_makes_a_step_slower(link, layout):
    faster = replace(link, bandwidth_bytes_per_s=2 * link.bandwidth_bytes_per_s, latency_s=link.latency_s / 2, duplex=True)
    assert predict(SMALL, faster, layout).seconds <= predict(SMALL, link, layout).seconds + 1e-12


@pytest.mark.parametrize("mode", ["kv_gather", "ring", "ulysses", "displaced"])
def test_over_a_free_link_the_ranks_share_all_but_the_fixed_time(mode):
    assert predict(SMALL, FREE, Layout(mode, ranks=4)).seconds == pytest.approx(0.1 + 0.7 / 4)


def test_over_a_free_link_a_pipeline_has_its_bubbles_and_a_serial_first_step():
    layout = Layout("pipefusion", ranks=4, patches=8)
    assert predict(SMALL, FREE, layout).seconds == pytest.approx(11 * (0.1 + 0.7 / 8) / 4)
    assert predict(SMALL, FREE, layout, first=True).seconds == pytest.approx(0.8)


def test_a_gather_waits_for_every_hop_of_every_layer():
    link, layout = Link("", 1e6, 0.001), Layout("kv_gather", ranks=4)
    exchange = 4 * 3 * 0.001 + exchange_bytes(SMALL, layout) / 1e6
    output = 3 * 0.001 + output_bytes(SMALL, layout) / 1e6
    assert predict(SMALL, link, layout).exposed_s == pytest.approx(exchange + output)


def test_a_ring_hides_a_hop_behind_the_attention_of_a_block():
    link, layout = Link("", 1e6, 0.0), Layout("ring", ranks=2)
    output, hop = output_bytes(SMALL, layout) / 1e6, exchange_bytes(SMALL, layout) / 1e6 / 4
    block = 0.25 * 0.8 / (4 * 2 * 2)
    assert hop < block and predict(SMALL, link, layout).exposed_s == pytest.approx(output)
    slow = replace(link, bandwidth_bytes_per_s=1e5)
    assert predict(SMALL, slow, layout).exposed_s == pytest.approx(10 * output + 4 * (10 * hop - block))


def test_displaced_hides_its_exchange_behind_the_step_but_not_in_the_first():
    link, layout = Link("", 1e6, 0.0), Layout("displaced", ranks=2)
    exchange, output = exchange_bytes(SMALL, layout) / 1e6, output_bytes(SMALL, layout) / 1e6
    assert predict(SMALL, link, layout).exposed_s == pytest.approx(exchange / 4 + output)  # the last of 4 layers
    assert predict(SMALL, link, layout, first=True).exposed_s == pytest.approx(exchange + output)
    crawling = replace(link, bandwidth_bytes_per_s=1e4)
    assert predict(SMALL, crawling, layout).exposed_s == pytest.approx(100 * (exchange + output) - (0.1 + 0.7 / 2))


def test_a_pipeline_waits_for_its_fill_and_for_patches_slower_than_a_stage():
    link, layout = Link("", 1e4, 0.0), Layout("pipefusion", ranks=2, patches=4)
    patch, turn, output = exchange_bytes(SMALL, layout) / 4 / 1e4, (0.1 + 0.7 / 4) / 2, output_bytes(SMALL, layout) / 1e4
    assert patch > turn and predict(SMALL, link, layout).exposed_s == pytest.approx(patch + 3 * (patch - turn) + output)


def test_half_duplex_doubles_the_wire():
    link, layout = Link("", 1e6, 0.0), Layout("ulysses", ranks=2)
    assert predict(SMALL, replace(link, duplex=False), layout).exchange_s == pytest.approx(2 * predict(SMALL, link, layout).exchange_s)


def test_the_codec_takes_its_time_for_what_a_rank_encodes_and_decodes():
    speeds = {"int4": CodecSpeed(encode_ns=3.0, decode_ns=2.0)}
    packet = 2 * 2 * 8 * 64  # K and V, 2 samples, 8 tokens, 64 columns
    assert predict(SMALL, FREE, Layout("kv_gather", "int4", 2), speeds=speeds).codec_s == pytest.approx(4 * packet * (3 + 2 * 2) * 1e-9)
    assert predict(SMALL, FREE, Layout("kv_gather", "int4", 2), first=True, speeds=speeds).codec_s == 0.0  # keyframes are int8, not given here


def test_cfg_groups_alone_halve_all_but_the_fixed_time():
    assert predict(SMALL, FREE, Layout("one_device", ranks=2, cfg=True)).seconds == pytest.approx(0.1 + 0.35)


ERRORS = {"int8": 0.0003, "int4": 0.006, "int2": 0.03, "int1": 0.09, "displaced:none": 0.06, "pipefusion:none": 0.05}


def test_the_choice_is_the_fastest_within_the_bound():
    for bound in (0.0, 0.01, 0.04, 1.0):
        best = choose(FLUX, LINKS["10gbe"], 4, bound, ERRORS, Terms(steps=28))
        assert best.error <= bound and best.seconds == min(seconds for seconds, _ in best.considered) <= best.one_device_s
        assert best.seconds == pytest.approx(image_seconds(FLUX, LINKS["10gbe"], best.layout, 28))
    assert best.layout.ranks > 1 and "one device 28.1 s" in best.reason


def test_one_device_is_chosen_and_named_when_it_is_fastest():
    best = choose(WORKLOADS["dit-xl-2-512"], LINKS["100mbit"], 8, 0.01, ERRORS, Terms(cfg=False))
    assert best.layout == Layout("one_device") and best.seconds == best.one_device_s
    assert best.reason.startswith("one device is fastest") and "others" in best.reason
    assert choose(SMALL, FREE, 1, 0.01, ERRORS).reason.startswith("one device: no other layout is possible")


def test_nothing_unmeasured_is_chosen():
    considered = {(layout.mode, layout.codec) for _, layout in choose(FLUX, LINKS["1gbit"], 4, 1.0, ERRORS).considered}
    assert {one for one in considered if one[0] in ("displaced", "pipefusion")} == {("displaced", "none"), ("pipefusion", "none")}
    exact = choose(FLUX, LINKS["1gbit"], 4, 1.0, {}).considered
    assert {layout.codec for _, layout in exact} == {"none"} and "pipefusion" not in {layout.mode for _, layout in exact}


def test_an_error_of_one_mode_counts_for_that_mode_alone():
    best = choose(SMALL, LINKS["100mbit"], 2, 0.01, {"int1": 0.001, "ulysses:int1": 0.5})
    assert ("ulysses", "int1") not in {(layout.mode, layout.codec) for _, layout in best.considered}


@pytest.mark.parametrize("errors", [{"int3": 0.1}, {"gather:int4": 0.1}, {"int4": float("nan")}, {"int4": -0.1}])
def test_errors_of_codecs_or_modes_that_are_none_are_refused(errors):
    with pytest.raises(UsageError):
        choose(SMALL, FREE, 2, 0.1, errors)


def test_the_same_speed_goes_to_fewer_ranks():
    still = replace(SMALL, compute_s=0.1, fixed_s=0.1, attention_share=0.0)
    assert choose(still, FREE, 4, 1.0, ERRORS).layout.ranks == 1


def test_presets_say_where_their_figures_come_from():
    assert set(LINKS) == {"100mbit", "300mbit", "1gbit", "10gbe", "pcie4", "nvlink"}
    assert all(workload.source.startswith(("assumed:", "measured")) for workload in WORKLOADS.values())
    assert [WORKLOADS[name].tokens for name in ("dit-xl-2-512", "pixart-1024", "flux-1024")] == [1024, 4096, 4608]
    assert set(ASSUMED_GPU_SPEEDS) == {"int8", "int4", "int2", "int1"}


def test_an_image_has_a_step():
    with pytest.raises(UsageError):
        image_seconds(SMALL, FREE, Layout("one_device"), 0)
