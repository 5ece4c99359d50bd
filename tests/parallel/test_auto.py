"""mode="auto": what is chosen for links and models, the measuring replaced by figures."""

from types import SimpleNamespace

import pytest

from dite.parallel import auto
from dite.parallel.cost import CodecSpeed
from dite.parallel.workload import Link, Workload

SPEEDS = {name: CodecSpeed(0.3, 0.3) for name in ("none", "int8", "int4", "int2", "int1")}


@pytest.fixture
def decided(monkeypatch, build_model):
    def decide(bandwidth, family="DiTTransformer2DModel", bound=auto.ERROR_BOUND, ranks=2):
        shape = {"layers": 12, "tokens": 1024, "width": 768, "heads": 12, "output_channels": 32, "batch": 2, "value_bytes": 2}
        workload = Workload(name="test", compute_s=1.0, attention_share=0.2, fixed_s=0.0, output_tokens=1024, source="a test", **shape)
        monkeypatch.setattr(auto, "measure", lambda *_: (workload, Link("measured", bandwidth, 1e-4), SPEEDS))
        return auto.decide(build_model(family), SimpleNamespace(size=ranks), bound)

    return decide


def test_a_dead_slow_link_leaves_the_picture_to_one_device(decided):
    found = decided(1e3, "FluxTransformer2DModel")
    assert found.degree == 1 and found.reason.startswith("one device is fastest")


def test_guidance_branches_are_shared_out_first_where_the_model_is_called_once_for_both(decided):
    assert decided(1e6).mode == "cfg"


def test_a_fast_link_needs_no_codec(decided):
    assert decided(1e11, "FluxTransformer2DModel").codec == "none"


def test_a_slow_link_takes_the_smallest_codec_within_the_bound(decided):
    assert decided(30e6, "FluxTransformer2DModel").codec == "int2"
    assert decided(30e6, "FluxTransformer2DModel", bound=0.002).codec == "int4"


def test_nothing_stale_is_chosen_for_a_model_with_joint_text(decided):
    assert decided(1e6, "FluxTransformer2DModel", bound=1.0).mode not in ("displaced", "pipefusion")


def test_all_ranks_or_one_are_used_and_never_some(decided):
    assert decided(1e7, "FluxTransformer2DModel", ranks=4).degree in (1, 4)
