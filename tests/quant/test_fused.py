"""What is done along the way is what was done before, and nobody can tell except by the time it takes."""

import copy

import pytest
import torch
from diffusers.models.activations import GELU

import dite
from dite.models.families import example_inputs
from dite.quant.apply import replace_
from dite.quant.linear import QuantLinear, set_backend
from dite.quant.scheme import ActivationScheme, LayerScheme, TransformScheme, WeightScheme

SCHEME = LayerScheme(weight=WeightScheme(num_bits=8, group_size=32), activation=ActivationScheme(num_bits=8))
SCHEMES = [
    SCHEME,
    SCHEME.model_copy(update={"activation": None}),
    SCHEME.model_copy(update={"transform": TransformScheme(kind="hadamard", block=32)}),
]


def quantized(scheme=SCHEME, approximate="tanh"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(GELU(64, 48, approximate=approximate))
    replace_(model, "0.proj", QuantLinear.from_linear(model[0].proj, scheme))
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference", "expanded"])
def test_the_result_is_that_of_linear_and_gelu(scheme, approximate, backend):
    model, x = quantized(scheme, approximate), torch.randn(2, 9, 64)
    model[0].proj.backend = backend
    expected = torch.nn.functional.gelu(model[0].proj(x), approximate=approximate)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass():
    model, x = quantized(), torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_hooks_on_the_linear_are_called_with_its_own_output():
    model, x, seen = quantized(), torch.randn(3, 64), []
    model[0].proj.register_forward_hook(lambda _module, _args, y: seen.append(y))
    y = model(x)
    assert torch.allclose(torch.nn.functional.gelu(seen[0], approximate="tanh"), y)


def test_an_unquantized_linear_put_back_works_as_before():
    model, x, plain = quantized(), torch.randn(3, 64), torch.nn.Linear(64, 48)
    replace_(model, "0.proj", plain)
    assert torch.equal(model(x), torch.nn.functional.gelu(plain(x), approximate="tanh"))


def test_copies_compute_the_same():
    model, x = quantized(), torch.randn(3, 64)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert isinstance(twin[0], GELU) and torch.equal(twin(x), expected) and torch.equal(model(x), expected)


def dit_block(**config):
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    settings = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "attention_bias": True, "norm_elementwise_affine": False}
    model = torch.nn.Sequential(BasicTransformerBlock(48, 2, 24, activation_fn="gelu-approximate", **settings | config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(2, 9, 48, dtype=dtype), "timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 10])}


def quantize_(model, name="0.ff.net.2"):
    replace_(model, name, QuantLinear.from_linear(model.get_submodule(name), SCHEME))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
@torch.no_grad()
def test_a_fused_block_computes_what_it_did(dtype, tolerance):
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.normalization import AdaLayerNormZero

    model = dit_block().to(dtype)
    for name in ("0.norm1.linear", "0.ff.net.2"):
        quantize_(model, name)
    found = model[0](**inputs(dtype))
    assert type(model[0]) is not BasicTransformerBlock
    model[0].__class__, model[0].norm1.__class__ = BasicTransformerBlock, AdaLayerNormZero
    expected = model[0](**inputs(dtype))
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("config", [{"cross_attention_dim": 48}, {"norm_type": "layer_norm"}, {"norm_elementwise_affine": True}])
def test_a_block_with_other_parts_is_left_alone(config):
    from diffusers.models.attention import BasicTransformerBlock

    model = dit_block(**config)
    quantize_(model)
    assert type(model[0]) is BasicTransformerBlock


def test_gradients_pass_through_a_fused_block():
    model, given = dit_block(), inputs()
    quantize_(model)
    given["hidden_states"].requires_grad_()
    model[0](**given).sum().backward()
    assert given["hidden_states"].grad.isfinite().all()


@torch.no_grad()
def test_hooks_inside_a_fused_block_are_called():
    model, seen = dit_block(), []
    quantize_(model)
    for name in ("norm1", "norm1.norm", "norm3", "attn1", "ff"):
        model[0].get_submodule(name).register_forward_hook(lambda *_given, name=name: seen.append(name))
    model[0](**inputs())
    assert seen == ["norm1.norm", "norm1", "attn1", "norm3", "ff"]


def test_gradient_checkpointing_works(tiny_pipeline):
    model = tiny_pipeline.transformer
    dite.quantize(model, "w8a8", effort="fast")
    model.enable_gradient_checkpointing()
    model.train()
    given = example_inputs(model)
    given["hidden_states"].requires_grad_()
    model(**given)[0].sum().backward()
    assert given["hidden_states"].grad.isfinite().all()


def test_hooks_on_all_modules_are_called():
    model, seen = quantized(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_given: seen.append(type(module).__name__))
    try:
        model(torch.randn(3, 64))
    finally:
        handle.remove()
    assert seen == ["QuantLinear", "GELU", "Sequential"]


@torch.no_grad()
def test_the_reference_backend_is_the_reference_throughout(monkeypatch):
    model = dit_block()
    quantize_(model)
    set_backend(model, "reference")
    monkeypatch.setattr("dite_kernels.cpu.block._call", None)
    assert model[0](**inputs()).isfinite().all()
