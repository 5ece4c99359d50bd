import pytest
import torch
from torch import nn

from dite.errors import UnsupportedModel
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
    assert [(block.path, block.count) for block in found.blocks] == [("inner.layers", 3)] and len(found.linears) == 9


@pytest.mark.parametrize("model", [nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleList([nn.ReLU(), nn.ReLU()]), nn.Module()])
def test_a_model_without_repeated_blocks_is_refused(model):
    with pytest.raises(UnsupportedModel, match="no list of at least 2 like blocks"):
        discover(nn.Sequential(model))
