"""`model.dequantize()`, diffusers' own door: back to plain linears, of the values that the codes stood for."""

import pytest
import torch
from torch import nn

import dite
from dite.errors import UsageError
from dite.models.families import example_inputs
from dite.quant.apply import quantized_layers

WITHOUT_ROUNDED_ACTIVATIONS = ["defaults.token.activation=null"]


@torch.no_grad()
def output(model):
    return model(**example_inputs(model))[0]


def test_a_dequantized_model_computes_what_its_codes_stood_for_and_is_plain(family_model, tmp_path):
    plain = type(family_model)
    classes = {name: type(module) for name, module in family_model.named_modules()}
    dite.quantize(family_model, "w8a8", effort="fast", overrides=WITHOUT_ROUNDED_ACTIVATIONS)
    dite.save(family_model, tmp_path / "q")
    loaded, expected = dite.load(tmp_path / "q"), output(family_model)
    assert quantized_layers(loaded)
    restored = loaded.dequantize()
    assert torch.allclose(output(restored), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not quantized_layers(restored) and {name: type(module) for name, module in restored.named_modules()} == classes
    restored.save_pretrained(tmp_path / "plain")
    again = plain.from_pretrained(tmp_path / "plain")
    assert "quantization_config" not in again.config and torch.equal(output(again), output(restored))


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8"])
def test_calibrated_layers_go_back_to_about_their_weights(tiny_pipeline, recipe):
    weights = {name: module.weight.clone() for name, module in tiny_pipeline.transformer.named_modules() if isinstance(module, nn.Linear)}
    dite.quantize(tiny_pipeline, recipe, overrides=["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=4"])
    tiny_pipeline.transformer.dequantize()
    for name, weight in weights.items():
        found = tiny_pipeline.transformer.get_submodule(name).weight
        assert (found - weight).norm() / weight.norm() < 0.25, name


def test_a_model_with_adapters_is_refused(tiny_pipeline):
    peft = pytest.importorskip("peft", reason="needs dite[lora]")
    model = tiny_pipeline.transformer
    dite.quantize(model, "w8a8", effort="fast")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), model)
    with pytest.raises(UsageError, match="can't be dequantized"):
        model.dequantize()
    assert quantized_layers(model)
