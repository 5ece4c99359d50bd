"""The search finds a plan within its budget, deploys the plan it found, and goes on where it was interrupted."""

import json

import pytest
import torch

import dite
from dite.errors import QuantizationError, RecipeError, ResumeConflict, UsageError
from dite.models.families import example_inputs
from dite.ptq.journal import Journal
from dite.quant.apply import quantized_layers

QUICK = ["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=8", "rounding=nearest"]
OPTIONS = ["search.group_sizes=[16,null]", "search.bits=[4,8]", "search.transforms=[none]", "search.max_forwards=2600"]
BITS = [*QUICK, *OPTIONS, "search.budget_bits=7"]
DP, EVOLUTION = [*BITS, "search.strategy=dp"], [*BITS, "search.strategy=evolution"]


def layers_of(pipe):
    return {name: (layer.scheme, layer.qdata.clone()) for name, layer in quantized_layers(pipe.transformer).items()}


def same(first, second):
    return first.keys() == second.keys() and all(first[name][0] == second[name][0] and torch.equal(first[name][1], second[name][1]) for name in first)


@pytest.mark.parametrize("strategy", [DP, EVOLUTION])
def test_the_plan_found_is_the_plan_deployed_and_within_budget(tiny_pipeline, strategy, tmp_path):
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=strategy)
    weights = sum(row["in_features"] * row["out_features"] for row in report.plan["layers"])
    assert 8 * sum(row["bytes"] for row in report.plan["layers"]) / weights <= 7
    assert {row["weight_bits"] for row in report.layers} == {4, 8}
    for row in report.plan["layers"]:
        scheme = quantized_layers(tiny_pipeline.transformer)[row["name"]].scheme
        assert (scheme.weight.num_bits, scheme.weight.group_size) == (row["weight_bits"], row["group_size"])
    dite.save(tiny_pipeline, tmp_path / "q")
    assert json.loads((tmp_path / "q" / "plan.json").read_text()) == json.loads(json.dumps(report.plan))
    inputs = example_inputs(tiny_pipeline.transformer)
    with torch.no_grad():
        assert torch.equal(dite.load(tmp_path / "q").transformer(**inputs)[0], tiny_pipeline.transformer(**inputs)[0])


def test_the_plan_found_is_no_worse_than_the_uniform_plan_that_fits(tiny_pipeline):
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=DP)
    fitting = [plan["error"] for plan in report.plan["uniform"] if plan["name"] == "W4"]
    assert report.plan["error"] <= fitting[0]


def test_a_budget_in_bytes_holds_for_the_whole_transformer(tiny_pipeline, twin):
    tiny_pipeline.to(torch.bfloat16), twin.to(torch.bfloat16)
    uniform = dite.quantize(twin, "w8a8", overrides=["effort=fast"])
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, *OPTIONS, "search.strategy=dp", f"search.budget_bytes={uniform.bytes}"])
    assert report.bytes <= uniform.bytes and next(tiny_pipeline.transformer.parameters()).dtype == torch.bfloat16


def test_a_budget_in_time_is_held_by_measured_times(tiny_pipeline):
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, *OPTIONS, "search.strategy=dp", "search.budget_time_ms=1000"])
    assert report.plan["search"]["budget"] == {"kind": "time", "limit": 1000.0} and report.plan["frontier"] == []
    assert all(plan["bytes"] > report.plan["bytes"] / 3 for plan in report.plan["uniform"])


@pytest.mark.parametrize("budget", ["search.budget_bits=4", "search.budget_bytes=1000", "search.budget_time_ms=0.001"])
def test_an_infeasible_budget_is_refused_with_the_smallest_and_nothing_changes(tiny_pipeline, budget):
    with pytest.raises(UsageError, match="the smallest that"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, *OPTIONS, "search.strategy=dp", budget])
    assert not quantized_layers(tiny_pipeline.transformer)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["search.strategy=dp"], "needs a budget"),
        (["search.strategy=dp", "search.budget_bits=5", "search.budget_bytes=9"], "one budget at a time"),
        (["search.budget_bits=5"], "is for a search"),
        (["search.strategy=dp", "search.budget_bits=5", "search.fitness=fid"], "evolution"),
        (["search.strategy=dp", "search.budget_bits=5", "search.bits=[5]"], "4, 6 or 8"),
        (["search.strategy=dp", "search.budget_bits=5", "search.group_sizes=[100]"], "multiple of 16"),
        (["search.strategy=dp", "search.budget_bits=.inf"], "finite"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_runs(tiny_pipeline, wrong, why):
    with pytest.raises(RecipeError, match=why):
        dite.quantize(tiny_pipeline, "w4a8", overrides=wrong)


def test_a_search_with_too_few_forwards_says_how_many_it_needs(tiny_pipeline):
    with pytest.raises(UsageError, match="max_forwards"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=[*DP, "search.max_forwards=100"])
    assert not quantized_layers(tiny_pipeline.transformer)


def test_a_pattern_of_the_recipe_fixes_its_layers(tiny_pipeline):
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=[*DP, "layers={'*.attn1.to_q': {weight: {num_bits: 6}}}", "search.budget_bits=8"])
    assert {row["weight_bits"] for row in report.layers if row["name"].endswith("to_q")} == {6}


@pytest.mark.parametrize("strategy", [DP, EVOLUTION])
@pytest.mark.parametrize("stop_after", [0, 7, 15])
def test_a_search_interrupted_anywhere_resumes_to_the_same_plan(tiny_pipeline, twin, tmp_path, monkeypatch, strategy, stop_after):
    dite.quantize(tiny_pipeline, "w4a8", overrides=strategy)
    add, count = Journal.add, [0]

    def interrupted(self, key, error):
        if count[0] == stop_after:
            raise KeyboardInterrupt
        count[0] += 1
        add(self, key, error)

    monkeypatch.setattr(Journal, "add", interrupted)
    before = twin.transformer(**example_inputs(twin.transformer))[0]
    with pytest.raises(KeyboardInterrupt):
        dite.quantize(twin, "w4a8", overrides=strategy, journal=tmp_path / "j")
    assert torch.equal(twin.transformer(**example_inputs(twin.transformer))[0], before)
    monkeypatch.setattr(Journal, "add", add)
    dite.quantize(twin, "w4a8", overrides=strategy, journal=tmp_path / "j")
    assert same(layers_of(tiny_pipeline), layers_of(twin))


def test_a_journal_of_another_recipe_or_model_is_refused(tiny_pipeline, twin, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", overrides=DP, journal=tmp_path / "j")
    with pytest.raises(ResumeConflict, match="recipe"):
        dite.quantize(twin, "w4a8", overrides=[*DP, "search.seed=1"], journal=tmp_path / "j")
    with torch.no_grad():
        twin.transformer.transformer_blocks[0].attn1.to_q.weight += 1
    with pytest.raises(ResumeConflict, match="model"):
        dite.quantize(twin, "w4a8", overrides=DP, journal=tmp_path / "j")
    assert not quantized_layers(twin.transformer)


def test_nan_in_calibration_names_the_layer(tiny_pipeline):
    with torch.no_grad():
        tiny_pipeline.transformer.pos_embed.proj.bias.fill_(float("nan"))
    with pytest.raises((QuantizationError, dite.errors.DiteError), match=r"NaN|not finite"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=DP)


def test_a_bare_model_cannot_be_searched(tiny_pipeline):
    with pytest.raises(UsageError, match="no sampler"):
        dite.quantize(tiny_pipeline.transformer, "w4a8", overrides=DP)


def test_layers_that_saw_too_little_are_named(tiny_pipeline):
    few = ["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=4", "rounding=auto"]
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=few)
    assert any("fewer calibration rows" in note for note in report.notes)


def test_a_plan_can_be_repeated_without_searching(tiny_pipeline, twin, tmp_path):
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=[*DP, "search.transforms=[none,hadamard]"])
    (tmp_path / "plan.json").write_text(json.dumps(report.plan))
    again = dite.quantize(twin, tmp_path / "plan.json")
    assert again.plan is None and same(layers_of(tiny_pipeline), layers_of(twin))


def test_a_plan_for_another_model_is_refused(tiny_pipeline, build_model, tmp_path):
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=DP)
    (tmp_path / "plan.json").write_text(json.dumps(report.plan))
    other = build_model("PixArtTransformer2DModel")
    with pytest.raises(UsageError, match="another model"):
        dite.quantize(other, tmp_path / "plan.json")
    assert not quantized_layers(other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": {}, "layers": [{}], "model": {}}', '{"recipe": 3}'])
def test_a_file_that_is_no_plan_is_refused(tiny_pipeline, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(RecipeError, match="not a plan"):
        dite.quantize(tiny_pipeline, tmp_path / "plan.json")


def test_the_best_plan_measured_is_the_one_deployed_wherever_the_forwards_run_out(tiny_pipeline):
    import copy

    for most in (2600, 4400, 6000):
        report = dite.quantize(copy.deepcopy(tiny_pipeline), "w4a8", overrides=[*DP, f"search.max_forwards={most}"])
        layers = report.plan["layers"]
        other = report.plan["bytes"] - sum(row["bytes"] for row in layers)
        budget = 7 * sum(row["in_features"] * row["out_features"] for row in layers) / 8
        fitting = [plan["error"] for plan in report.plan["evaluated"] if plan["bytes"] - other <= budget]
        assert report.plan["error"] == min(fitting) and report.plan["search"]["forwards"] <= most


def test_swaps_are_tried_when_there_are_forwards_for_them(tiny_pipeline, monkeypatch):
    from dite.ptq import search

    before = []
    monkeypatch.setattr(search, "_swap", lambda plans, table, swap=search._swap: before.append(len(plans.evaluated)) or swap(plans, table))
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=[*DP, "search.max_forwards=9000"])
    assert len(report.plan["evaluated"]) > before[0]


def test_a_searched_half_precision_model_is_the_one_that_is_saved(tiny_pipeline, tmp_path):
    dite.save(tiny_pipeline, tmp_path / "fp")
    pipe = dite.load(tmp_path / "fp", dtype="bfloat16")
    before = {name: tensor.dtype for name, tensor in pipe.transformer.named_buffers()}
    dite.quantize(pipe, "w4a8", overrides=[*DP, "search.transforms=[smooth+hadamard,lowrank]", "rank=2", "search.budget_bits=9"])
    assert all(tensor.dtype == before[name] for name, tensor in pipe.transformer.named_buffers() if name in before)
    dite.save(pipe, tmp_path / "q")
    inputs = example_inputs(pipe.transformer)
    with torch.no_grad():
        assert torch.equal(dite.load(tmp_path / "q", dtype="bfloat16").transformer(**inputs)[0], pipe.transformer(**inputs)[0])


def test_scales_too_small_for_half_precision_count_as_what_they_take(tiny_pipeline):
    with torch.no_grad():
        for block in tiny_pipeline.transformer.transformer_blocks:
            block.attn1.to_q.weight[0] *= 1e-6
    tiny_pipeline.to(torch.bfloat16)
    report = dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, *OPTIONS, "search.strategy=dp", "search.budget_bytes=320000"])
    assert report.bytes <= 320000


def test_a_transform_asked_for_by_name_is_made_on_conditioning_layers_too(tiny_pipeline):
    dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, "layers={'*.norm1.linear': {transform: hadamard}}"])
    assert quantized_layers(tiny_pipeline.transformer)["transformer_blocks.0.norm1.linear"].scheme.transform.kind == "hadamard"
