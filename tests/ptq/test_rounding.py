"""Calibrated quantization: better than rounding on the inputs that a model really has, and the same after a reload."""

import copy

import pytest
import torch
from torch import nn

import dite
from dite.errors import UsageError
from dite.models.families import example_inputs
from dite.ptq import rounding
from dite.ptq.calibrate import LayerInputs
from dite.ptq.plan_document import transform_name
from dite.ptq.rounding import Choices, choices_of, output_error, round_layer
from dite.quant.apply import quantized_layers
from dite.quant.linear import QuantLinear
from dite.quant.plan import LayerPlan
from dite.quant.scheme import ActivationScheme, LayerScheme, TransformScheme, WeightScheme
from dite.recipe import load_recipe

W4A4 = LayerScheme(weight=WeightScheme(num_bits=4, group_size=32), activation=ActivationScheme(num_bits=4))
QUICK = ["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=8"]
CALIBRATED = [*QUICK, "rounding=auto", "transform=auto"]


@pytest.fixture
def problem():
    """A linear and inputs with outlier channels, as moments to calibrate on and rows to judge by."""
    torch.manual_seed(0)
    x = torch.randn(900, 160) @ torch.randn(160, 160) * 0.1
    x[:, 7] *= 30
    return nn.Linear(160, 24), inputs_of(x[:700], x[700:])


def inputs_of(x, held_out):
    return LayerInputs(x.T @ x, len(x), [held_out], x.sum(0), x.abs().amax(0))


def best(problem, transform="auto", rounding="auto", scheme=W4A4):
    linear, inputs = problem
    return round_layer(linear, scheme, inputs, Choices(transform, rounding))


@pytest.mark.parametrize("sign_seed", [None, 3])
@pytest.mark.parametrize("block", [16, 128])
def test_a_rotated_layer_computes_the_same_function(block, sign_seed):
    linear = nn.Linear(100, 6)
    scheme = LayerScheme(weight=WeightScheme(), transform=TransformScheme(kind="hadamard", block=block, sign_seed=sign_seed))
    layer = QuantLinear.from_linear(linear, scheme)
    x = torch.randn(3, 5, 100)
    assert (layer(x) - linear(x)).norm() < 0.01 * linear(x).norm()
    assert (layer.dequantize() - linear.weight).norm() < 0.01 * linear.weight.norm()


def test_every_choice_is_at_least_as_good_as_rounding(problem):
    nearest = best(problem, transform="none", rounding="nearest")
    assert nearest.error == pytest.approx(output_error(problem[0], QuantLinear.from_linear(problem[0], W4A4), problem[1].rows[0]), rel=1e-3)
    gptq, rotated, auto = best(problem, transform="none"), best(problem, rounding="nearest", transform="hadamard"), best(problem)
    assert auto.error <= min(gptq.error, rotated.error) < nearest.error
    assert auto.layer.scheme.transform.rotates and auto.error < 0.6 * nearest.error


def test_a_rotation_that_does_not_pay_is_not_made():
    torch.manual_seed(0)
    x = torch.randn(600, 64)
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-7, 8, (8, 64)) / 7.0)  # what 4 bits hold exactly
    scheme = LayerScheme(weight=WeightScheme(num_bits=4, group_size=None, symmetric=True), activation=ActivationScheme())
    found = best((linear, inputs_of(x[:500], x[500:])), scheme=scheme)
    assert found.layer.scheme.transform.kind == "none"


def test_conditioning_layers_are_transformed_only_where_a_pattern_says_so():
    layer = LayerPlan("a.norm1.linear", "conditioning", 8, 8, W4A4)
    assert choices_of(load_recipe("w4a8", ["transform=hadamard"]), layer).transform == "none"
    assert choices_of(load_recipe("w4a8", ["layers={'*.norm1.*': {transform: hadamard}}"]), layer).transform == "hadamard"


def test_moments_that_are_not_finite_fall_back_to_rounding(problem):
    linear, inputs = problem
    inputs.moments[0, 0] = torch.nan
    found = round_layer(linear, W4A4, inputs, Choices("auto", "gptq"))
    assert found.rounding == "nearest" and torch.equal(found.layer.qdata, QuantLinear.from_linear(linear, W4A4).qdata)


def test_a_calibrated_model_reloads_bit_identical(tiny_pipeline, tmp_path):
    from diffusers import DiTPipeline

    report = dite.quantize(tiny_pipeline, "w4a4", overrides=[*QUICK, "rounding=gptq", "transform=hadamard"])
    assert {(row["kind"], row["transform"], row["rounding"]) for row in report.layers} == {
        ("token", "hadamard", "gptq"),
        ("conditioning", "none", "gptq"),
    }
    dite.save(tiny_pipeline, tmp_path / "q")
    inputs = example_inputs(tiny_pipeline.transformer)
    with torch.no_grad():
        wanted = tiny_pipeline.transformer(**inputs)[0]
        for load in (dite.load, DiTPipeline.from_pretrained):
            assert torch.equal(load(tmp_path / "q").transformer(**inputs)[0], wanted)


def test_the_report_tells_how_each_layer_was_rounded_and_its_output_error(tiny_pipeline):
    report = dite.quantize(tiny_pipeline, "w4a4", overrides=CALIBRATED)
    layers = quantized_layers(tiny_pipeline.transformer)
    for row in report.layers:
        assert row["error_of"] == "outputs" and 0 < row["error"] < 1 and row["rounding"] in ("nearest", "gptq")
        assert row["transform"] == layers[row["name"]].scheme.transform.kind
    assert report.recipe.rounding == "auto"


def test_the_same_seed_gives_the_same_codes(tiny_pipeline):
    import copy

    twin = copy.deepcopy(tiny_pipeline.transformer)
    dite.quantize(tiny_pipeline, "w4a8", overrides=CALIBRATED)
    first, tiny_pipeline.transformer = tiny_pipeline.transformer, twin
    dite.quantize(tiny_pipeline, "w4a8", overrides=CALIBRATED)
    for name, layer in quantized_layers(first).items():
        assert torch.equal(layer.qdata, twin.get_submodule(name).qdata)


def test_few_layers_at_a_time_give_the_same_layers(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(rounding, "MOMENT_BYTES", 1)
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=CALIBRATED)
    assert len(report.layers) == len(quantized_layers(tiny_pipeline.transformer)) == len({row["name"] for row in report.layers})


def test_a_recipe_that_calibrates_is_refused_while_loading(tiny_pipeline, tmp_path):
    from diffusers import DiTTransformer2DModel

    tiny_pipeline.transformer.save_pretrained(tmp_path / "t")
    recipe = load_recipe("w4a8", [*QUICK, "rounding=gptq"])
    with pytest.raises(UsageError, match="while loading"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "t", quantization_config=dite.DiteConfig(recipe))


def test_a_recipe_that_leaves_it_to_auto_is_rounded_while_loading_and_says_so(tiny_pipeline, tmp_path, caplog):
    from diffusers import DiTTransformer2DModel

    tiny_pipeline.transformer.save_pretrained(tmp_path / "t")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "t", quantization_config=dite.DiteConfig("w4a8"))
    assert "rounds to nearest" in caplog.text
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    for name, layer in quantized_layers(tiny_pipeline.transformer).items():
        assert torch.equal(layer.qdata, loaded.get_submodule(name).qdata)


def test_a_bare_model_cannot_be_calibrated_and_stays_as_it_was(tiny_pipeline):
    with pytest.raises(UsageError, match="calibrates"):
        dite.quantize(tiny_pipeline.transformer, "w4a8", overrides=[*QUICK, "transform=hadamard"])
    assert not quantized_layers(tiny_pipeline.transformer)


def test_a_bare_model_is_rounded_where_the_recipe_leaves_it_to_auto_and_the_report_says_so(tiny_pipeline):
    report = dite.quantize(tiny_pipeline.transformer, "w4a8")
    assert "not calibrated" in report.notes[0] and {row["rounding"] for row in report.layers} == {"nearest"}


@pytest.mark.parametrize("transform", ["smooth", "smooth+hadamard", "lowrank", "hadamard+lowrank", "smooth+lowrank"])
def test_every_transform_is_at_least_as_good_as_none_where_channels_stand_out(problem, transform):
    assert best(problem, transform=transform).error < best(problem, transform="none").error
    assert transform_name(best(problem, transform=transform).layer.scheme) == transform


def test_a_bias_is_corrected_where_that_helps(problem):
    linear, inputs = problem
    shifted = inputs_of(inputs.rows[0] + 3, inputs.rows[0] + 3)
    found = round_layer(linear, W4A4, shifted, Choices("none", "nearest"))
    assert not torch.equal(found.layer.bias, linear.bias)
    assert found.error < output_error(linear, QuantLinear.from_linear(linear, W4A4), shifted.rows[0])


@pytest.mark.parametrize("transform", ["smooth+hadamard", "smooth+lowrank"])
def test_a_transformed_model_reloads_bit_identical_in_half_precision(tiny_pipeline, tmp_path, transform):
    from diffusers import DiTPipeline

    dite.save(tiny_pipeline, tmp_path / "fp")
    pipe = dite.load(tmp_path / "fp", dtype="bfloat16")
    dite.quantize(pipe, "w4a8", overrides=[*QUICK, f"transform={transform}", "rank=4"])
    dite.save(pipe, tmp_path / "q")
    inputs = example_inputs(pipe.transformer)
    with torch.no_grad():
        wanted = pipe.transformer(**inputs)[0]
        for loaded in (dite.load(tmp_path / "q", dtype="bfloat16"), DiTPipeline.from_pretrained(tmp_path / "q", torch_dtype=torch.bfloat16)):
            assert torch.equal(loaded.transformer(**inputs)[0], wanted)


def test_high_effort_tries_more_and_calibrates_on_what_quantized_layers_put_out(tiny_pipeline, monkeypatch):
    seen = []
    monkeypatch.setattr(
        rounding, "observe", lambda model, names, calls, observe=rounding.observe: seen.append(len(names)) or observe(model, names, calls)
    )
    report = dite.quantize(tiny_pipeline, "w4a4", effort="high", overrides=QUICK)
    assert len(seen) == 5 and sum(seen) == len(report.layers) and report.recipe.effort == "high"
    assert {row["transform"] for row in report.layers} <= {"none", "hadamard", "smooth", "smooth+hadamard"}


@pytest.mark.parametrize("stop_after", [0, 1, 5])
@pytest.mark.parametrize("flags", [["effort=high"], ["transform=smooth+lowrank", "rank=4"]])
def test_calibration_interrupted_anywhere_resumes_to_the_same_layers_and_repeats_none(tiny_pipeline, twin, tmp_path, stop_after, flags, monkeypatch):
    resumed = copy.deepcopy(twin)
    wanted = dite.quantize(twin, "w4a8", overrides=[*QUICK, *flags])

    def interrupted(what, done, total):
        if what.startswith("layers") and done > stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, *flags], journal=tmp_path / "j", progress=interrupted)
    rounded = []
    monkeypatch.setattr(rounding, "round_layer", lambda *given: rounded.append(given[-1]) or round_layer(*given))
    monkeypatch.setattr("dite.ptq.calibrated.record", None)
    report = dite.quantize(resumed, "w4a8", overrides=[*QUICK, *flags], journal=tmp_path / "j")
    assert len(rounded) == len(report.layers) - stop_after - 1 and report.notes == wanted.notes and report.layers == wanted.layers
    found, expected = resumed.transformer.state_dict(), twin.transformer.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
