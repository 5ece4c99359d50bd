"""The simulation of several ranks in one process, and what needs no ranks at all."""

import pytest
import torch
from samples import FAMILIES, build, denoise, error, pipeline

from dite.errors import DiteError, UnsupportedModel, UsageError
from dite.models.families import example_inputs
from dite.parallel.handle import parallelize

DIT, WAN, FLUX = "DiTTransformer2DModel", "WanTransformer3DModel", "FluxTransformer2DModel"


def simulated(model, mode, codec="none", steps=3, degree=3, **more):
    inputs = example_inputs(model)
    with parallelize(model, degree, mode, codec, simulate=True, **more) as par:
        return denoise(model, inputs, steps), par.stats()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["kv_gather", "ring", "ulysses"])
def test_without_a_codec_synchronous_modes_are_one_device_bit_for_bit(family, mode):
    model = build(family)
    one = denoise(model, example_inputs(model), 2)
    assert torch.equal(simulated(model, mode, steps=2)[0], one)


@pytest.mark.parametrize("mode, degree", [("displaced", 3), ("pipefusion", 2)])
def test_stale_modes_are_exact_in_the_first_step_only(mode, degree):
    model = build(DIT)
    one = [denoise(model, example_inputs(model), steps) for steps in (1, 3)]
    assert torch.equal(simulated(model, mode, steps=1, degree=degree)[0], one[0])
    assert 1e-5 < error(simulated(model, mode, degree=degree)[0], one[1]) < 0.1


def test_finer_codecs_are_nearer_to_one_device():
    model = build(DIT)
    one = denoise(model, example_inputs(model), 5)
    errors = [error(simulated(model, "kv_gather", codec, 5)[0], one) for codec in ("int8", "int4", "int2", "int1")]
    assert errors == sorted(errors) and errors[0] > 0


def test_fewer_bits_are_fewer_bytes_and_raw_is_counted_alike():
    model = build(DIT)
    stats = {codec: simulated(model, "kv_gather", codec)[1] for codec in ("none", "int8", "int4", "int1")}
    sent = [one["bytes_sent"] for one in stats.values()]
    assert sent == sorted(sent, reverse=True) and len({one["bytes_raw"] for one in stats.values()}) == 1


def test_a_pipelines_second_picture_equals_its_first():
    pipe = pipeline()

    def draw():
        return pipe(class_labels=[1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images

    with parallelize(pipe, 3, "kv_gather", "int2", simulate=True) as par:
        first, second = draw(), draw()
        assert len(par.streams()) == 2 * 2 * 3  # K and V of two layers of three ranks: of the last request only
    assert (first == second).all()


@pytest.mark.parametrize("mode", ["kv_gather", "displaced", "cfg"])
def test_one_rank_is_the_plain_model_bit_for_bit(mode):
    model = build(DIT)
    one = denoise(model, example_inputs(model), 3)
    with parallelize(model, 1, mode if mode != "cfg" else "kv_gather", "int1") as par:
        assert torch.equal(denoise(model, example_inputs(model), 3), one)
    assert par.stats()["mode"] == "one device" and par.stats()["bytes_sent"] == 0


@pytest.mark.parametrize("mode", ["kv_gather", "pipefusion"])
def test_an_exception_leaves_the_model_as_it_was(mode):
    model = build(WAN)
    one = denoise(model, example_inputs(model), 2)
    with pytest.raises(KeyError), parallelize(model, 2, mode, "int4", simulate=True):
        denoise(model, example_inputs(model), 1)
        raise KeyError
    assert torch.equal(denoise(model, example_inputs(model), 2), one)
    assert "forward" not in vars(model)


def test_an_unknown_model_is_refused_with_those_that_are_known():
    with pytest.raises(UnsupportedModel, match="DiTTransformer2DModel"):
        parallelize(torch.nn.Sequential(torch.nn.Linear(2, 2)), 2, simulate=True)


def test_a_process_started_alone_is_told_how_to_start_several():
    with pytest.raises(UsageError, match="torchrun"):
        parallelize(build(DIT), 2)


@pytest.mark.parametrize("wrong", [{"mode": "kv"}, {"codec": "int5"}, {"order": 3}, {"damping": 2}, {"degree": 0, "mode": "cfg3"}, {"degree": 500}])
def test_wrong_arguments_are_refused_and_leave_the_model_alone(wrong):
    model = build(DIT)
    with pytest.raises(DiteError):
        parallelize(model, **{"degree": 2, "simulate": True} | wrong)
    assert "forward" not in vars(model)
