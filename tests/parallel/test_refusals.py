"""What `parallelize` refuses, and why: before any rank is waited for."""

import threading

import pytest
import torch

import dite
from dite.errors import UnsupportedModel, UsageError
from dite.parallel.schedule import Schedule


def draw(pipe, steps=2):
    return pipe(class_labels=[1], num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 0}, "0 ranks"),
        ({"degree": 2, "codec": None}, "can't be a NoneType"),
        ({"degree": 2, "codec": "int3"}, "no codec"),
        ({"degree": 2, "patches": 4}, "pipefusion alone"),
        ({"degree": 2, "mode": "pipefusion", "patches": -1}, "-1 patches"),
        ({"degree": 2, "mode": "auto", "simulate": True}, "can't be simulated"),
        ({"degree": 2, "codec": "auto", "simulate": True}, "can't be simulated"),
        ({"degree": 2, "codec": "auto", "order": 1}, "residual order 1"),
        ({"degree": 2, "codec": "auto", "order": 0}, "residual order 0"),
        ({"degree": 2, "mode": "auto", "codec": "none", "order": 0}, "residual order 0"),
        ({"degree": 2, "order": 3}, "residual order 3"),
        ({"degree": 2, "damping": 1.5}, "damping 1.5"),
        ({"degree": 3, "mode": "cfg"}, "cfg degree 2 must divide"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tiny_pipeline, arguments, message):
    with pytest.raises(UsageError, match=message):
        dite.parallelize(tiny_pipeline, **arguments)


@pytest.mark.parametrize(("mode", "degree", "message"), [("ulysses", 4, "3 heads"), ("pipefusion", 3, "2 blocks")])
def test_a_model_too_small_for_a_mode_is_refused_with_the_numbers(tiny_pipeline, mode, degree, message):
    with pytest.raises(UnsupportedModel, match=message):
        dite.parallelize(tiny_pipeline, degree, mode)


def test_a_model_in_float64_is_refused(tiny_pipeline):
    with pytest.raises(UnsupportedModel, match="float64"):
        dite.parallelize(tiny_pipeline.to(torch.float64), 2, simulate=True)


def test_a_model_with_hooks_of_accelerate_is_refused(tiny_pipeline):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(tiny_pipeline.transformer, ModelHook())
    with pytest.raises(UnsupportedModel, match="accelerate's hooks"):
        dite.parallelize(tiny_pipeline, 2, simulate=True)


def test_a_model_compiled_in_place_is_refused(tiny_pipeline):
    tiny_pipeline.transformer.compile()
    with pytest.raises(UnsupportedModel, match="compiled"):
        dite.parallelize(tiny_pipeline, 2, simulate=True)


def test_a_pipeline_of_two_transformers_is_refused(tiny_pipeline, build_model):
    tiny_pipeline.transformer_2 = build_model("DiTTransformer2DModel")
    with pytest.raises(UnsupportedModel, match="2 transformers"):
        dite.parallelize(tiny_pipeline, 2, simulate=True)


def test_a_schedule_of_too_few_steps_is_refused_before_the_picture(tiny_pipeline):
    schedule = Schedule.from_table([["int4", "int4"]] * 3)
    with dite.parallelize(tiny_pipeline, 2, codec=schedule, simulate=True):
        draw(tiny_pipeline, steps=3)
        with pytest.raises(UsageError, match="3"):
            draw(tiny_pipeline, steps=4)


def test_a_schedule_of_another_model_is_refused(tiny_pipeline):
    schedule = Schedule.from_table([["int4"] * 5] * 3)
    with dite.parallelize(tiny_pipeline, 2, codec=schedule, simulate=True), pytest.raises(UsageError, match="5 layers"):
        draw(tiny_pipeline, steps=3)


def test_a_second_thread_is_refused(tiny_pipeline):
    seen = []

    def other():
        try:
            draw(tiny_pipeline)
        except UsageError as error:
            seen.append(error.what)

    with dite.parallelize(tiny_pipeline, 2, simulate=True):
        draw(tiny_pipeline)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
    assert seen == ["a model that is shared out was called from another thread"]


def test_a_scheduler_that_was_exchanged_does_not_mix_two_pictures(tiny_pipeline):
    with dite.parallelize(tiny_pipeline, 2, codec="int1", simulate=True):
        fresh = draw(tiny_pipeline, steps=4)
        tiny_pipeline.scheduler = type(tiny_pipeline.scheduler).from_config(tiny_pipeline.scheduler.config)
        draw(tiny_pipeline, steps=4)
        assert (draw(tiny_pipeline, steps=4) == fresh).all()
