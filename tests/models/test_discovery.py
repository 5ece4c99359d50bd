import accelerate
import pytest
import torch
from torch import nn

import dite
from dite.errors import QuantizationError, UnsupportedModel, UsageError
from dite.models.discovery import discover
from dite.models.families import example_inputs


def test_structure_tells_the_same_kinds_as_observation(family_model):
    observed, structural = discover(family_model, example_inputs(family_model)), discover(family_model)
    assert observed.basis == "observed" and structural.basis == "structure"
    assert observed.linears == structural.linears


def test_every_linear_is_either_inside_a_block_or_listed_as_outside(family_model):
    found = discover(family_model)
    names = {name for name, module in family_model.named_modules() if isinstance(module, nn.Linear)}
    assert {linear.name for linear in found.linears} | set(found.outside) == names


def test_modulations_are_conditioning_and_feed_forwards_are_token(build_model):
    model = build_model("DiTTransformer2DModel")
    kinds = {linear.name: linear.kind for linear in discover(model, example_inputs(model)).linears}
    assert kinds["transformer_blocks.0.norm1.linear"] == "conditioning"
    assert kinds["transformer_blocks.1.ff.net.2"] == "token"


def test_a_failing_example_forward_is_told(build_model):
    found = discover(build_model("DiTTransformer2DModel"), {"hidden_states": torch.zeros(1, 3)})
    assert found.basis.startswith("structure (the example forward failed") and found.linears


def test_a_home_made_transformer_is_found_without_its_name():
    class Home(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"layers": nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(3))})

    found = discover(Home())
    assert [(block.path, block.count) for block in found.blocks] == [("inner.layers", 3)]
    # Three feed-forward pairs; the attention's out_proj is read behind the layer's back and must stay.
    assert len(found.linears) == 6 and len(found.outside) == 3


class Gated(nn.Module):
    """A block with a feed-forward through SiLU, a modulation after SiLU, and some of it frozen in eval mode."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.mod = nn.Sequential(nn.SiLU(), nn.Linear(16, 32))

    def forward(self, x, c):
        return x + self.ff(x) * self.mod(c)[:, None, :16]


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x, c):
        for layer in self.layers:
            x = layer(x, c)
        return x


INPUTS = {"x": torch.randn(1, 5, 16), "c": torch.randn(1, 16)}


@pytest.mark.parametrize("inputs", [None, INPUTS])
def test_a_silu_makes_a_modulation_only_without_a_linear_before_it(inputs):
    kinds = {linear.name: linear.kind for linear in discover(Stack(), inputs).linears}
    assert kinds["layers.0.ff.2"] == "token" and kinds["layers.0.mod.1"] == "conditioning"


def test_looking_at_a_model_changes_no_training_mode():
    model = Stack()
    model.layers[0].eval()
    discover(model, INPUTS)
    assert model.training and not model.layers[0].training and model.layers[1].training


def test_inputs_that_a_user_gave_must_fit():
    with pytest.raises(UsageError, match="don't fit the model"):
        discover(Stack(), {"x": torch.randn(1, 5, 3)}, strict=True)


def test_a_home_made_model_quantizes_and_runs():
    model = Stack()
    before = model(**INPUTS)
    report = dite.quantize(model, "w8a8", example_inputs=INPUTS)
    assert report.basis == "observed" and (model(**INPUTS) - before).norm() / before.norm() < 0.05


@pytest.mark.parametrize("model", [nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleList([nn.ReLU(), nn.ReLU()]), nn.Module()])
def test_a_model_without_repeated_blocks_is_refused(model):
    with pytest.raises(UnsupportedModel, match="no list of at least 2 like blocks"):
        discover(nn.Sequential(model))


class Scaled(nn.Linear):
    """Looks like a linear, and computes something else."""

    def forward(self, x):
        return 3 * super().forward(x)


class Plain(nn.Linear):
    """A linear by another name."""


def one_changed(change):
    """A model of two blocks, and the name of its one linear that `change` was made to."""
    model = Stack()
    change(model.layers[0].ff)
    return model, "layers.0.ff.0"


def scaled(ff):
    ff[0] = Scaled(16, 32)


def patched(ff):
    ff[0].forward = lambda x: 3 * nn.functional.linear(x, ff[0].weight, ff[0].bias)


CHANGES = {
    "a class of its own": (scaled, "computes something else than a linear (Scaled)"),
    "a forward of its own": (patched, "hooks on its forward"),
    "a hook on its output": (lambda ff: ff[0].register_forward_hook(lambda _, __, y: 3 * y), "hooks on its forward"),
    "a hook on its input": (lambda ff: ff[0].register_forward_pre_hook(lambda _, x: (3 * x[0],)), "hooks on its forward"),
    "hooks of accelerate": (lambda ff: accelerate.hooks.add_hook_to_module(ff[0], accelerate.hooks.ModelHook()), "hooks on its forward"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("inputs", [None, INPUTS])
def test_a_linear_that_computes_something_else_is_left_alone_with_the_reason(name, inputs):
    change, reason = CHANGES[name]
    model, layer = one_changed(change)
    kept = model.get_submodule(layer)
    before = model(**INPUTS)
    report = dite.quantize(model, "w8a8", example_inputs=inputs)
    assert reason in report.skipped[layer] and model.get_submodule(layer) is kept
    assert len(report.layers) == 5 and (model(**INPUTS) - before).norm() / before.norm() < 0.05


def test_a_recipe_that_names_such_a_linear_does_not_change_that():
    model, layer = one_changed(scaled)
    report = dite.quantize(model, "w8a8", overrides=[f"layers.{layer}.weight.num_bits=4"], example_inputs=INPUTS)
    assert "Scaled" in report.skipped[layer]


def test_a_subclass_that_computes_the_same_is_quantized():
    def change(ff):
        ff[0] = Plain(16, 32)

    model, layer = one_changed(change)
    assert layer in {linear.name for linear in discover(model).linears}


def test_diffusers_own_linear_for_old_adapters_is_quantized_without_one():
    from diffusers.models.lora import LoRACompatibleLinear

    def change(ff):
        ff[0] = LoRACompatibleLinear(16, 32)

    model, layer = one_changed(change)
    assert layer in {linear.name for linear in discover(model).linears}
    model.layers[0].ff[0].set_lora_layer(nn.Linear(16, 32))
    assert "LoRACompatibleLinear" in discover(model).outside[layer]


def test_a_quantized_linear_is_found_as_a_linear():
    model = Stack()
    dite.quantize(model, "w8a8")
    assert len(discover(model).linears) == 6


def test_where_every_linear_has_hooks_the_refusal_says_so():
    model = Stack()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModel, match="leaves all 6 linears alone: it has hooks on its forward"):
        dite.quantize(model, "w8a8")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_weights_that_no_codes_can_be_made_of_are_refused_by_layer_and_dtype(dtype, hooked):
    def change(ff):
        ff[0].weight = nn.Parameter(ff[0].weight.detach().to(dtype), requires_grad=False)
        if hooked:  # diffusers' layerwise casting has both
            ff[0].register_forward_hook(lambda *_: None)

    model, layer = one_changed(change)
    with pytest.raises(QuantizationError, match=rf"(?s)layer {layer} can't be quantized.*{dtype}"):
        dite.quantize(model, "w8a8")


@pytest.mark.parametrize(("value", "sound"), [(1.0, True), (float("nan"), False)])
def test_float8_where_nothing_is_quantized_is_only_looked_at(value, sound):
    model = Stack()
    model.table = nn.Parameter(torch.full((4,), value).to(torch.float8_e4m3fn), requires_grad=False)
    if sound:
        assert len(dite.quantize(model, "w8a8").layers) == 6
    else:
        with pytest.raises(QuantizationError, match="table is not finite"):
            dite.quantize(model, "w8a8")
