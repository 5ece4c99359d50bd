"""Save, reload, compare bit by bit."""

import json

import pytest
import torch
from diffusers import ConfigMixin, DiTPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.configuration_utils import register_to_config
from torch import nn

import dite
from dite.checkpoint.format import MANIFEST, verify_folder
from dite.errors import OutputExists, UnsupportedModel, UsageError
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


class Home(ModelMixin, ConfigMixin):
    """Two blocks of two linears, and a table beside them."""

    @register_to_config
    def __init__(self, width: int = 32):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"first": nn.Linear(width, width), "second": nn.Linear(width, width)}) for _ in range(2))
        self.table = nn.Embedding(width, width)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["second"](torch.relu(block["first"](x)))
        return x


def share_a_layer(model):
    model.blocks[1]["second"] = model.blocks[0]["second"]


def share_a_block(model):
    model.blocks[1] = model.blocks[0]


def tie_weights(model):
    model.blocks[1]["second"].weight = model.blocks[0]["second"].weight


def view_of_another(model):
    model.blocks[1]["second"].weight = nn.Parameter(model.blocks[0]["second"].weight.detach()[:])


@pytest.mark.parametrize(("share", "quantized"), [(share_a_layer, True), (share_a_block, True), (share_a_layer, False), (tie_weights, False),
                                                  (view_of_another, False)])  # fmt: skip
@pytest.mark.parametrize("called", [False, True])
def test_a_tensor_with_two_names_is_refused_by_both_before_anything_is_written(share, quantized, called, tmp_path):
    model = Home()
    share(model)
    if quantized:
        dite.quantize(model, "w4a8")
    if called:  # then a backend may hold the codes
        model(torch.randn(1, 5, 32))
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.\w+\.\w+ and blocks\.1\.\w+\.\w+ are one tensor"):
        dite.save(model, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_tied_are_saved_once_each_layer_has_codes_of_its_own(tmp_path):
    model = Home()
    tie_weights(model)
    dite.quantize(model, "w4a8")
    x = torch.randn(1, 5, 32)
    again = Home.from_pretrained(dite.save(model, tmp_path / "q"))
    assert torch.equal(again(x), model(x))


def halves_of_one_storage(model):
    whole = torch.randn(64, 32)
    model.blocks[0]["first"].weight, model.blocks[1]["first"].weight = (nn.Parameter(part) for part in whole.chunk(2))


def transposed(model):
    model.table.weight = nn.Parameter(model.blocks[0]["first"].weight.detach().t())


@pytest.mark.parametrize("share", [halves_of_one_storage, transposed])
def test_what_diffusers_itself_saves_is_saved(share, tmp_path):
    model = Home()
    share(model)
    again = Home.from_pretrained(dite.save(model, tmp_path / "q"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_text_encoder_whose_embedding_has_two_names_is_saved(tmp_path):
    """Those of transformers know it, and write one."""
    from tests.text.pipelines import PIPELINES

    pipe = PIPELINES["pixart"]()
    assert pipe.text_encoder.shared.weight is pipe.text_encoder.encoder.embed_tokens.weight
    again = dite.load(dite.save(pipe, tmp_path / "q"))
    assert torch.equal(again.text_encoder.shared.weight, pipe.text_encoder.shared.weight)
