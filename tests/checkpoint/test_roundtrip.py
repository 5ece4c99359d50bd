"""Save, reload, compare bit by bit."""

import json

import pytest
import torch
from diffusers import DiTPipeline, PipelineQuantizationConfig

import dite
from dite.checkpoint.format import MANIFEST, verify_folder
from dite.errors import OutputExists, UsageError
from dite.models.families import example_inputs
from dite.quant.apply import quantized_layers
from dite.recipe import load_recipe


@torch.no_grad()
def output(model):
    return model(**example_inputs(model))[0].nan_to_num(7)  # fp16 overflows in some random models: the same everywhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reloaded_model_computes_the_same_bits(family_model, dtype, tmp_path):
    family_model.save_pretrained(tmp_path / "fp")
    model = type(family_model).from_pretrained(tmp_path / "fp", torch_dtype=dtype)
    dite.quantize(model, "w4a8", effort="fast")
    dite.save(model, tmp_path / "q")
    expected = output(model)
    assert torch.equal(output(dite.load(tmp_path / "q", dtype=dtype)), expected)
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "q", torch_dtype=dtype)), expected)


@pytest.mark.parametrize("recipe", ["w8a8", "w6a8", "w4a4"])
def test_every_recipe_survives_a_plain_diffusers_round_trip(tiny_pipeline, recipe, tmp_path):
    dite.quantize(tiny_pipeline, recipe, effort="fast")
    tiny_pipeline.save_pretrained(tmp_path / "q")
    assert torch.equal(output(DiTPipeline.from_pretrained(tmp_path / "q").transformer), output(tiny_pipeline.transformer))


def test_shards_give_the_same_model(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    tiny_pipeline.save_pretrained(tmp_path / "q", max_shard_size="100KB")
    assert len(list((tmp_path / "q" / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(output(DiTPipeline.from_pretrained(tmp_path / "q").transformer), output(tiny_pipeline.transformer))


def test_loading_in_bf16_keeps_the_stored_scales(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    dite.save(tiny_pipeline, tmp_path / "q")
    loaded = quantized_layers(dite.load(tmp_path / "q", dtype="bfloat16").transformer)
    for name, layer in quantized_layers(tiny_pipeline.transformer).items():
        assert loaded[name].scale.dtype == layer.scale.dtype and torch.equal(loaded[name].scale, layer.scale)


def test_a_saved_quantized_model_can_be_loaded_and_saved_again(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    dite.save(tiny_pipeline, tmp_path / "a")
    dite.save(dite.load(tmp_path / "a"), tmp_path / "b")
    names = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "model_index.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_quantizing_while_loading_equals_quantizing_after(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "fp")
    config = PipelineQuantizationConfig(quant_mapping={"transformer": dite.DiteConfig("w4a8")})
    while_loading = DiTPipeline.from_pretrained(tmp_path / "fp", quantization_config=config)
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    assert torch.equal(output(while_loading.transformer), output(tiny_pipeline.transformer))
    while_loading.save_pretrained(tmp_path / "q")
    assert torch.equal(output(dite.load(tmp_path / "q").transformer), output(tiny_pipeline.transformer))


def test_class_names_survive_and_machine_paths_do_not(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "fp")
    pipe = DiTPipeline.from_pretrained(tmp_path / "fp", id2label={0: "airplane, aeroplane", 8: "ship"})
    dite.save(pipe, tmp_path / "q")
    assert dite.load(tmp_path / "q").labels == {"airplane": 0, "aeroplane": 0, "ship": 8}
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "q").rglob("*.json"))


def test_the_recipe_is_stored_and_survives_another_save(tiny_pipeline, tmp_path):
    recipe = load_recipe("w4a8", ["defaults.token.weight.group_size=64", "effort=fast"])
    dite.quantize(tiny_pipeline, recipe)
    dite.save(tiny_pipeline, tmp_path / "q")
    dite.save(dite.load(tmp_path / "q"), tmp_path / "again")
    for folder in ("q", "again"):
        assert load_recipe(tmp_path / folder / "recipe.yaml") == recipe


def test_the_configuration_lists_every_quantized_layer(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    dite.save(tiny_pipeline, tmp_path / "q")
    stored = json.loads((tmp_path / "q" / "transformer" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "dite" and stored["format_version"] == 1
    assert set(stored["layers"]) == set(quantized_layers(tiny_pipeline.transformer)) and "proj_out_1" in stored["skipped"]


def test_an_existing_output_is_not_touched_unless_asked(tiny_pipeline, tmp_path):
    dite.save(tiny_pipeline, tmp_path / "q")
    before = (tmp_path / "q" / MANIFEST).read_bytes()
    with pytest.raises(OutputExists):
        dite.save(tiny_pipeline, tmp_path / "q")
    assert (tmp_path / "q" / MANIFEST).read_bytes() == before
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    dite.save(tiny_pipeline, tmp_path / "q", overwrite=True)
    verify_folder(tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_overwriting_refuses_a_folder_that_holds_something_else(tiny_pipeline, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="something else"):
        dite.save(tiny_pipeline, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


def test_a_failed_save_leaves_the_old_model_and_no_litter(tiny_pipeline, tmp_path, monkeypatch):
    dite.save(tiny_pipeline, tmp_path / "q")
    monkeypatch.setattr("dite.checkpoint.save._write_manifest", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dite.save(tiny_pipeline, tmp_path / "q", overwrite=True)
    verify_folder(tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
