"""LoRA adapters on quantized models, through PEFT (DiT, PixArt: any model) and through diffusers (SD3, FLUX: those with a loader of their own)."""

import copy
import io

import pytest
import torch
from diffusers.quantizers.base import DiffusersQuantizer

import dite
from dite.errors import UnsupportedModel, UsageError
from dite.models.families import example_inputs
from dite.quant.apply import quantized_layers
from dite.quant.linear import QuantLinear
from dite.quant.lora import adapted_layers

peft = pytest.importorskip("peft", reason='LoRA needs peft: pip install ".[lora]"')

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WITH_LOADER = {"SD3Transformer2DModel": "StableDiffusion3Pipeline", "FluxTransformer2DModel": "FluxPipeline"}
WITHOUT_LOADER = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


@torch.no_grad()
def output(model):
    return model(**example_inputs(model))[0]


def config(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "init_lora_weights": False, **options})


def inject(model, seed=0, name="default", **options):
    """A random adapter that does something."""
    torch.manual_seed(seed)
    return peft.inject_adapter_in_model(config(**options), model, adapter_name=name).eval()


def remove(model):
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)


def pipeline(model):
    """A pipeline that holds nothing but `model`, of the class that loads its adapters."""
    import diffusers

    cls = getattr(diffusers, WITH_LOADER[type(model).__name__])
    nothing = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    takes = {name: None for name in nothing if name in cls.__init__.__annotations__}
    return cls(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **takes)


@pytest.fixture(params=WITH_LOADER)
def pair(request, build_model, tmp_path):
    """A full-precision pipeline, a quantized one of the same weights, and a folder with two adapters made for the first."""
    full, small = build_model(request.param), build_model(request.param)
    dite.quantize(small, "w4a8", effort="fast")
    for seed, name in enumerate(("one", "two")):
        trained = inject(build_model(request.param), seed)
        layers = peft.get_peft_model_state_dict(trained)
        type(pipeline(full)).save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    return pipeline(full), pipeline(small), tmp_path


def load(pipe, folder, name="one"):
    pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)


def test_an_adapted_layer_adds_the_adapter_to_the_quantized_output(family_model):
    dite.quantize(family_model, "w4a8", effort="fast")
    inject(family_model)
    name = next(name for name in adapted_layers(family_model) if isinstance(family_model.get_submodule(name).base_layer, QuantLinear))
    layer, x = family_model.get_submodule(name), torch.randn(5, 48)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(layer(x), layer.base_layer(x) + 2.0 * (x @ a.t() @ b.t()))


@pytest.mark.parametrize("name", WITHOUT_LOADER)
def test_an_injected_adapter_has_the_effect_it_has_at_full_precision(build_model, name):
    full, small = build_model(name), build_model(name)
    dite.quantize(small, "w8a8", effort="fast")
    plain_full, plain_small = output(full), output(small)
    adapted = output(inject(full))
    effect, expected = output(inject(small)) - plain_small, adapted - plain_full
    assert expected.norm() > 0.05 * plain_full.norm() and (effect - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", WITHOUT_LOADER)
def test_an_injected_adapter_comes_off_without_a_trace(build_model, name):
    model = build_model(name)
    dite.quantize(model, "w4a8", effort="fast")
    before, layers = output(model), quantized_layers(model)
    assert not torch.equal(output(inject(model)), before)
    remove(model)
    assert torch.equal(output(model), before) and quantized_layers(model) == layers and not adapted_layers(model)


def test_an_adapter_made_for_full_precision_loads_and_has_its_effect(pair):
    full, small, folder = pair
    dite_before, before = output(small.transformer), output(full.transformer)
    for pipe in (full, small):
        load(pipe, folder)
    assert adapted_layers(full.transformer) == adapted_layers(small.transformer)
    expected, effect = output(full.transformer) - before, output(small.transformer) - dite_before
    assert (effect - expected).norm() < 0.3 * expected.norm()


def test_weights_of_several_adapters_are_obeyed(pair):
    _, pipe, folder = pair
    before, outputs = output(pipe.transformer), {}
    load(pipe, folder, "one")
    load(pipe, folder, "two")
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.5, 0.0)):
        pipe.set_adapters(["one", "two"], adapter_weights=list(weights))
        outputs[weights] = output(pipe.transformer)
    pipe.set_adapters("one")
    assert torch.equal(output(pipe.transformer), outputs[1.0, 0.0]) and torch.equal(outputs[0.0, 0.0], before)
    assert len({tuple(values.flatten().tolist()) for values in outputs.values()}) == len(outputs)


def test_disabling_deleting_and_unloading_bring_the_outputs_back(pair):
    _, pipe, folder = pair
    before, layers = output(pipe.transformer), quantized_layers(pipe.transformer)
    load(pipe, folder)
    adapted = output(pipe.transformer)
    pipe.disable_lora()
    assert torch.equal(output(pipe.transformer), before)
    pipe.enable_lora()
    assert torch.equal(output(pipe.transformer), adapted) and not torch.equal(adapted, before)
    pipe.delete_adapters("one")
    assert torch.equal(output(pipe.transformer), before)
    load(pipe, folder, "two")
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer), before) and quantized_layers(pipe.transformer) == layers
    load(pipe, folder)
    assert torch.equal(output(pipe.transformer), adapted)


def test_a_saved_model_loads_adapters_too(pair):
    _, pipe, folder = pair
    dite.save(pipe.transformer, folder / "q")
    for dtype in (torch.float32, torch.bfloat16):
        again = pipeline(dite.load(folder / "q", dtype=dtype))
        before = output(again.transformer)
        load(again, folder)
        assert again.transformer(**example_inputs(again.transformer))[0].dtype == dtype
        assert not torch.equal(output(again.transformer), before)


def test_fusing_is_refused_before_anything_changes(pair):
    _, pipe, folder = pair
    load(pipe, folder)
    before = output(pipe.transformer)
    for fuse in (pipe.fuse_lora, pipe.transformer.fuse_lora):
        with pytest.raises(UnsupportedModel, match=r"can't be fused into a quantized model\n.*integer codes.*\nuse the adapter unfused"):
            fuse(lora_scale=0.5)
    assert torch.equal(output(pipe.transformer), before)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_through_peft_is_refused_and_changes_no_code(build_model, safe):
    model = build_model("DiTTransformer2DModel")
    dite.quantize(model, "w4a8", effort="fast")
    state = copy.deepcopy(model.state_dict())
    wrapped = peft.get_peft_model(model, config())
    with pytest.raises(UnsupportedModel, match="no weight to compute with"):
        wrapped.merge_and_unload(safe_merge=safe)
    remove(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_adapters_that_need_the_weight_itself_are_refused(build_model, options):
    model = build_model("DiTTransformer2DModel")
    dite.quantize(model, "w4a8", effort="fast")
    with pytest.raises(UnsupportedModel, match="a plain LoRA adapter works unfused"):
        inject(model, **options)


def test_training_an_adapter_leaves_the_codes_and_lowers_the_loss(build_model):
    model = build_model("PixArtTransformer2DModel")
    dite.quantize(model, "w4a8", effort="fast")
    codes = {name: layer.qdata.clone() for name, layer in quantized_layers(model).items()}
    target = output(model) + 0.1
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config(init_lora_weights=True), model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, losses = torch.optim.Adam(trained.values(), lr=1e-2), []
    for _ in range(10):
        loss = (model(**example_inputs(model))[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all("lora_" in name and parameter.grad.any() for name, parameter in trained.items()) and losses[-1] < losses[0]
    assert all(torch.equal(codes[name.removesuffix(".base_layer")], layer.qdata) for name, layer in quantized_layers(model).items())


def test_a_copy_of_an_adapted_model_is_adapted_too(pair):
    _, pipe, folder = pair
    load(pipe, folder)
    again = copy.deepcopy(pipe.transformer)
    pipe.unload_lora_weights()
    adapted = output(again)
    again.unload_lora()
    assert not torch.equal(adapted, output(pipe.transformer)) and torch.equal(output(again), output(pipe.transformer))


def test_quantizing_with_adapters_attached_is_refused(build_model):
    model = inject(build_model("SD3Transformer2DModel"))
    with pytest.raises(UsageError, match=r"has adapters attached and can't be quantized\n.*transformer_blocks\.0\.attn\.to_q\nfuse them"):
        dite.quantize(model, "w4a8", effort="fast")
    assert not quantized_layers(model) and not dite.inspect(model).supports["quantize"]["ok"]


def test_fused_and_unloaded_adapters_are_quantized_with_the_model(pair):
    full, _, folder = pair
    before = output(full.transformer)
    load(full, folder)
    adapted = output(full.transformer)
    full.fuse_lora(components=["transformer"])
    full.unload_lora_weights()
    dite.quantize(full, "w8a8", effort="fast")
    assert (output(full.transformer) - adapted).norm() < 0.1 * (adapted - before).norm()


def test_saving_with_adapters_attached_is_refused_until_they_are_unloaded(pair):
    _, pipe, folder = pair
    load(pipe, folder)
    with pytest.raises(UsageError, match=r"adapters attached and can't be saved.*\n.*\n.*unload them first"):
        dite.save(pipe.transformer, folder / "q")
    assert not (folder / "q").exists()
    pipe.unload_lora_weights()
    assert torch.equal(output(dite.load(dite.save(pipe.transformer, folder / "q"))), output(pipe.transformer))


@pytest.mark.skipif(not hasattr(DiffusersQuantizer, "get_state_dict_and_metadata"), reason="this diffusers asks no quantizer what to save")
def test_save_pretrained_with_adapters_attached_is_refused(pair):
    _, pipe, folder = pair
    load(pipe, folder)
    with pytest.raises(UsageError, match="adapters attached"):
        pipe.transformer.save_pretrained(folder / "q")
    assert not list(folder.glob("q/*.safetensors"))


def test_the_state_dict_lists_codes_only_and_survives_torch_save(pair):
    _, pipe, _ = pair
    state, file = pipe.transformer.state_dict(), io.BytesIO()
    name = next(iter(quantized_layers(pipe.transformer)))
    assert f"{name}.weight" not in state and state[f"{name}.weight"].shape == quantized_layers(pipe.transformer)[name].weight.shape
    with pytest.raises(KeyError):
        state["no such layer.weight"]
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == state.keys()
