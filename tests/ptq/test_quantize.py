import pytest
import torch

import dite
from dite.errors import QuantizationError, RecipeError, UnsupportedModel, UsageError
from dite.models.families import example_inputs
from dite.ptq.quantize import plan
from dite.quant.apply import quantized_layers
from dite.recipe import recipe_names


@torch.no_grad()
def output(model):
    return model(**example_inputs(model))[0]


@pytest.mark.parametrize(("recipe", "limit"), [("w8a8", 0.02), ("w6a8", 0.05), ("w4a8", 0.25), ("w4a4", 0.3)])
def test_the_output_stays_close(family_model, recipe, limit):
    before = output(family_model)
    dite.quantize(family_model, recipe, effort="fast")
    assert 0 < (output(family_model) - before).norm() / before.norm() < limit


def test_the_plan_is_what_is_done(tiny_pipeline):
    planned = plan(tiny_pipeline, "w4a8")
    report = dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    assert {layer.name: layer.scheme for layer in planned.layers} == {
        name: layer.scheme for name, layer in quantized_layers(tiny_pipeline.transformer).items()
    }
    assert report.skipped == planned.skipped and [row["name"] for row in report.layers] == [layer.name for layer in planned.layers]


def test_the_estimate_is_the_size_on_disk(build_model):
    model = build_model("FluxTransformer2DModel").bfloat16()
    planned = plan(model, "w4a8")
    assert planned.estimated_bytes == dite.quantize(model, "w4a8", effort="fast").bytes


def test_equal_plans_have_equal_digests_and_others_do_not(tiny_pipeline):
    digests = [plan(tiny_pipeline, name).digest for name in ("w4a8", "w4a8", "w8a8")]
    assert digests[0] == digests[1] != digests[2]


def test_kinds_get_their_own_schemes(tiny_pipeline):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    layers = quantized_layers(tiny_pipeline.transformer)
    assert layers["transformer_blocks.0.norm1.linear"].scheme.activation is None
    assert layers["transformer_blocks.0.attn1.to_q"].scheme.activation.num_bits == 8
    assert layers["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"].scheme.weight.num_bits == 8


def test_a_pattern_can_skip_layers_and_says_why(tiny_pipeline):
    recipe = {**dite.recipe.load_recipe("w4a8").model_dump(mode="json"), "layers": {"*.attn1.*": {"skip": "attention is precious"}}}
    report = dite.quantize(tiny_pipeline, recipe, effort="fast")
    assert report.skipped["transformer_blocks.0.attn1.to_q"] == "attention is precious"
    assert not any("attn1" in row["name"] for row in report.layers)


def test_quantizing_twice_is_refused(tiny_pipeline):
    dite.quantize(tiny_pipeline, "w8a8", effort="fast")
    with pytest.raises(UsageError, match="quantized already"):
        dite.quantize(tiny_pipeline, "w4a8", effort="fast")


def test_a_nan_weight_is_refused_and_nothing_changes(tiny_pipeline):
    with torch.no_grad():
        tiny_pipeline.transformer.transformer_blocks[1].ff.net[2].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"transformer_blocks\.1\.ff\.net\.2"):
        dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    assert not quantized_layers(tiny_pipeline.transformer)


def test_a_pipeline_without_a_transformer_is_refused(tiny_pipeline):
    with pytest.raises(UnsupportedModel):
        dite.quantize(tiny_pipeline.vae, "w4a8", effort="fast")
    with pytest.raises(UnsupportedModel):
        dite.quantize("not a model", "w4a8")


def test_a_wrong_recipe_is_refused_before_anything_changes(tiny_pipeline):
    with pytest.raises(RecipeError, match="did you mean w4a8"):
        dite.quantize(tiny_pipeline, "w4a9", effort="fast")
    with pytest.raises(RecipeError, match="multiple of 16"):
        dite.quantize(tiny_pipeline, "w4a8", effort="fast", overrides=["defaults.token.weight.group_size=100"])
    assert not quantized_layers(tiny_pipeline.transformer)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, "null"])
def test_every_group_size_works_with_ragged_tails(tiny_pipeline, group_size):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast", overrides=[f"defaults.token.weight.group_size={group_size}"])
    assert output(tiny_pipeline.transformer).isfinite().all()


def test_a_pattern_that_names_nothing_is_reported(tiny_pipeline):
    report = dite.quantize(tiny_pipeline, "w4a8", effort="fast", overrides=["layers={blocks.*: {skip: x}, '*.ff.*': {weight: {num_bits: 8}}}"])
    assert report.to_dict()["unmatched_patterns"] == ["blocks.*"]


def test_a_pattern_reaches_linears_outside_the_blocks(tiny_pipeline):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast", overrides=["layers={proj_out_1: {weight: {num_bits: 8, group_size: 16}, activation: null}}"])
    layer = quantized_layers(tiny_pipeline.transformer)["proj_out_1"]
    assert layer.scheme.weight.num_bits == 8 and layer.scheme.activation is None


def test_a_group_size_that_cannot_be_is_refused_in_a_pattern_too(tiny_pipeline):
    with pytest.raises(RecipeError, match="multiple of 16"):
        dite.quantize(tiny_pipeline, "w4a8", effort="fast", overrides=["layers={'*': {weight: {group_size: 100}}}"])


def test_the_model_works_outside_no_grad(tiny_pipeline):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    assert tiny_pipeline.transformer(**example_inputs(tiny_pipeline.transformer))[0].isfinite().all()


def test_assigning_to_the_wrapper_reaches_the_pipeline(tiny_pipeline):
    wrapper, scheduler = dite.Pipeline(tiny_pipeline), type(tiny_pipeline.scheduler)()
    wrapper.scheduler = scheduler
    assert tiny_pipeline.scheduler is scheduler and wrapper.to("cpu") is wrapper


def test_progress_counts_every_layer(tiny_pipeline):
    seen = []
    report = dite.quantize(tiny_pipeline, "w8a8", effort="fast", progress=lambda *call: seen.append(call))
    assert [done for _, done, _ in seen] == list(range(1, len(report.layers) + 1))


def test_inspect_predicts_sizes_and_says_what_works(tiny_pipeline):
    seen = dite.inspect(tiny_pipeline).to_dict()
    assert set(recipe_names()) < set(seen["sizes"]) and seen["supports"]["quantize"] == {"ok": True, "reason": None}
    assert seen["blocks"] == [{"path": "transformer_blocks", "class": "BasicTransformerBlock", "count": 2}]


def test_inspect_of_a_quantized_model_says_why_it_cannot_be_quantized_again(tiny_pipeline):
    before = dite.inspect(tiny_pipeline).parameters
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    seen = dite.inspect(tiny_pipeline)
    assert seen.parameters == before and seen.supports["quantize"]["ok"] is False and seen.quantized["layers"]


def test_a_bare_model_cannot_generate(tiny_pipeline):
    assert dite.inspect(tiny_pipeline.transformer).supports["generate"]["ok"] is False


def test_the_wrapper_quantizes_delegates_and_reports(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "fp")
    pipe = dite.Pipeline.from_pretrained(tmp_path / "fp", quantize="w8a8", backend="reference")
    assert pipe.transformer is pipe.pipe.transformer and set(pipe.stats()["backends"]) == {"reference"}
    assert len(pipe([1], num_inference_steps=2).images) == 1
