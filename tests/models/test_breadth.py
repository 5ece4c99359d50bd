"""What people do with models: share and tie layers, cast, shard, offload, compile, copy. Each works, or is refused with the reason."""

import copy

import accelerate
import diffusers
import pytest
import torch
from torch import nn

import dite
from dite.errors import UnsupportedModel, UsageError
from dite.quant.apply import quantized_layers
from dite_evals.every_transformer import every_class, small_model

CLASSES = every_class()
INPUTS = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2])}


def forward(model, dtype=torch.float32):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(latents.to(dtype), **INPUTS).sample


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def quantized(tiny_pipeline):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    return tiny_pipeline.transformer


class Block(nn.Module):
    def __init__(self, second=None):
        super().__init__()
        self.first = nn.Linear(32, 32, bias=False)
        self.second = second or nn.Linear(32, 32)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class HomeMade(nn.Module):
    def __init__(self, second=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(second) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def error_of(model):
    """Quantizes `model` at 8 bits; returns the relative error of its output."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        dite.quantize(model, "w8a8")
        return float((model(x) - before).norm() / before.norm())


def test_a_layer_with_several_names_is_quantized_once_and_under_all_of_them():
    model = HomeMade(nn.Linear(32, 32))
    assert error_of(model) < 0.01
    assert len({id(block.second) for block in model.blocks}) == 1
    assert not any(type(module) is nn.Linear for module in model.modules())


def test_a_block_that_is_called_again_and_again_is_quantized_once():
    model = HomeMade()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    assert error_of(model) < 0.01 and len(quantized_layers(model)) == 2


def test_tied_weights_are_quantized_for_each_layer_and_the_original_is_left_alone():
    model = HomeMade()
    tied = model.blocks[0].first.weight
    model.blocks[1].first.weight = tied
    kept = tied.detach().clone()
    assert error_of(model) < 0.01 and torch.equal(tied, kept)
    assert torch.equal(model.blocks[0].first.qdata, model.blocks[1].first.qdata)


def test_layers_without_a_bias_stay_without_one():
    model = HomeMade()
    dite.quantize(model, "w4a8")
    assert all(block.first.bias is None and block.second.bias is not None for block in model.blocks)
    assert not any(name.endswith("first.bias") for name in model.state_dict())


def test_sana_keeps_its_convolutions_and_quantizes_its_linears():
    model = small_model(CLASSES["SanaTransformer2DModel"])
    convolutions = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    report = dite.quantize(model, "w4a8")
    assert {layer["name"].split(".")[2] for layer in report.layers} == {"attn1", "attn2"}
    assert any(".ff." in name for name in convolutions)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in convolutions.items())


def test_fused_projections_are_quantized_as_they_are():
    flux2 = small_model(CLASSES["Flux2Transformer2DModel"])
    names = {layer["name"] for layer in dite.quantize(flux2, "w4a8").layers}
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in names


def test_projections_are_fused_before_quantizing_and_not_after(build_model):
    flux = build_model("FluxTransformer2DModel")
    fused = copy.deepcopy(flux)
    fused.fuse_qkv_projections()
    names = {layer["name"] for layer in dite.quantize(fused, "w4a8").layers}
    assert "transformer_blocks.0.attn.to_qkv" in names
    dite.quantize(flux, "w4a8")
    with pytest.raises(UnsupportedModel, match="no weight to compute with"):
        flux.fuse_qkv_projections()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_of_every_dtype_load_to_the_same_model(tiny_pipeline, dtype, tmp_path):
    dite.save(tiny_pipeline.transformer, tmp_path / "whole")
    model = dite.load(tmp_path / "whole", dtype=dtype)
    dite.quantize(model, "w4a8")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for again in (dite.load(tmp_path / "shards", dtype=dtype), type(model).from_pretrained(tmp_path / "shards", torch_dtype=dtype)):
        assert again.dtype == dtype and torch.equal(forward(again, dtype), forward(model, dtype))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu"], ids=str)
def test_a_device_map_is_followed(quantized, device_map, tmp_path):
    dite.save(quantized, tmp_path / "model")
    again = type(quantized).from_pretrained(tmp_path / "model", device_map=device_map)
    assert torch.equal(forward(again), forward(quantized))


def test_an_automatic_device_map_is_followed_where_the_class_has_one(build_model, tmp_path):
    model = build_model("PixArtTransformer2DModel")
    dite.quantize(model, "w4a8")
    dite.save(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model", device_map="auto")
    assert not any(tensor.is_meta for tensor in again.parameters())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_device_map_onto_the_disk_is_refused_with_the_way_round(quantized, tmp_path):
    dite.save(quantized, tmp_path / "model")
    parts = dict.fromkeys(["pos_embed", "norm_out", "proj_out_1", "proj_out_2", "transformer_blocks.0"], "cpu") | {"transformer_blocks.1": "disk"}
    with pytest.raises(UsageError, match="onto the disk"):
        type(quantized).from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "away")


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after a call"])
def test_offloading_by_accelerate_changes_no_more_than_rounding(tiny_pipeline, buffers, called):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    expected = forward(copy.deepcopy(tiny_pipeline.transformer))
    if called:
        forward(tiny_pipeline.transformer)
    accelerate.cpu_offload(tiny_pipeline.transformer, execution_device=torch.device("cpu"), offload_buffers=buffers)
    first, second = forward(tiny_pipeline.transformer), forward(tiny_pipeline.transformer)
    assert close(first, expected) and torch.equal(first, second)  # hooks between modules keep them from working in one pass


def test_offloading_onto_the_disk_changes_no_more_than_rounding(quantized, tmp_path):
    expected = forward(quantized)
    accelerate.disk_offload(quantized, str(tmp_path), execution_device=torch.device("cpu"))
    assert close(forward(quantized), expected)


def test_group_offloading_changes_no_more_than_rounding(build_model):
    model = build_model("PixArtTransformer2DModel")
    dite.quantize(model, "w4a8")
    inputs = {
        "encoder_hidden_states": torch.randn(1, 5, 20),
        "timestep": torch.tensor([1]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = model(latents, **inputs).sample
        cpu = torch.device("cpu")
        diffusers.hooks.apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        assert close(model(latents, **inputs).sample, expected)


def test_what_is_offloaded_can_be_neither_saved_nor_quantized(quantized, make_tiny_pipeline, tmp_path):
    accelerate.cpu_offload(quantized, execution_device=torch.device("cpu"))
    with pytest.raises(UsageError, match="is not in memory"):
        dite.save(quantized, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    whole = make_tiny_pipeline()
    accelerate.cpu_offload(whole.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="not in memory"):
        dite.quantize(whole, "w4a8", effort="fast")


def test_a_copy_is_another_model_with_the_same_numbers(quantized):
    expected = forward(quantized)
    other = copy.deepcopy(quantized)
    other.dequantize()
    assert quantized_layers(quantized) and not quantized_layers(other) and torch.equal(forward(quantized), expected)


def test_a_state_dict_moves_strictly_between_models_quantized_alike(quantized, tiny_pipeline, make_tiny_pipeline):
    expected, state = forward(quantized), {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    for layer in quantized_layers(quantized).values():
        layer.scale = layer.scale * 2
    assert not torch.equal(forward(quantized), expected)
    quantized.load_state_dict(state, strict=True)
    assert torch.equal(forward(quantized), expected)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*weight"):
        make_tiny_pipeline().transformer.load_state_dict(state, strict=True)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_compiling_changes_no_more_than_rounding(tiny_pipeline, compiled_first):
    """With what dynamo traces run eagerly: graphs and guards are the same, and no C++ is compiled."""
    if compiled_first:
        tiny_pipeline.transformer = torch.compile(tiny_pipeline.transformer, backend="eager")
        forward(tiny_pipeline.transformer)
    report = dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    assert not any("_orig_mod" in layer["name"] for layer in report.layers)
    inner = getattr(tiny_pipeline.transformer, "_orig_mod", tiny_pipeline.transformer)
    compiled = tiny_pipeline.transformer if compiled_first else torch.compile(inner, backend="eager")
    assert close(forward(compiled), forward(inner)) and len(quantized_layers(inner)) == len(report.layers)


def test_a_compiled_model_is_saved_as_the_model_inside(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    expected = forward(tiny_pipeline.transformer)
    tiny_pipeline.transformer = torch.compile(tiny_pipeline.transformer, backend="eager")
    dite.save(tiny_pipeline, tmp_path / "model")
    assert torch.equal(forward(dite.load(tmp_path / "model").transformer), expected)
