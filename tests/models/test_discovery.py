import pytest
import torch
from torch import nn

import dite
from dite.errors import UnsupportedModel, UsageError
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
