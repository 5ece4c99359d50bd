"""`dite convert`: the original DiT's names become diffusers', a pickle that wants more than tensors is not obeyed, and limits hold."""

import math
import pickle

import pytest
import torch
from torch import nn

import dite


class Block(nn.Module):
    """A DiT block with adaLN-Zero, as published."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        q, k, v = self.attn["qkv"](self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.attn["proj"](mixed)
        inner = self.mlp["fc1"](self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return x + gate_mlp * self.mlp["fc2"](nn.functional.gelu(inner, approximate="tanh"))


class Upstream(nn.Module):
    """The published DiT with its own names; `frequencies` are diffusers', which divide by one less than the paper's code."""

    def __init__(self, width=48, heads=3, depth=2, side=4, patch=2, classes=10):
        super().__init__()
        self.patch, self.side = patch, side
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, width, patch, patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(sines(width, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        final = {"linear": nn.Linear(width, patch * patch * 8), "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))}
        self.final_layer = nn.ModuleDict(final)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, t, y):
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 127)
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        x = self.final_layer["linear"](self.norm(x) * (1 + scale) + shift)
        x = x.unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch, 8))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, self.side * self.patch, self.side * self.patch)


def sines(width, side):
    def one(places):
        angles = places[:, None] / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        return torch.cat([angles.sin(), angles.cos()], 1)

    row, column = torch.arange(side, dtype=torch.float64).repeat_interleave(side), torch.arange(side, dtype=torch.float64).repeat(side)
    return torch.cat([one(column), one(row)], 1)[None].float()


@pytest.fixture
def upstream():
    torch.manual_seed(0)
    model = Upstream().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def test_a_converted_dit_computes_what_the_original_does(upstream, run, tmp_path):
    torch.save({"ema": upstream.state_dict(), "args": {"lr": 1e-4}}, tmp_path / "dit.pt")
    outcome = run("convert", tmp_path / "dit.pt", "-o", tmp_path / "dit", "--heads", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["model_class"] == "DiTTransformer2DModel" and outcome.document["taken_from"] == "ema" and outcome.document["trusts"]
    model = dite.load(tmp_path / "dit")
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    found, wanted = model(x, timestep=t, class_labels=y).sample, upstream(x, t, y)
    assert wanted.abs().max() > 0.1 and (found - wanted).abs().max() < 1e-5


def test_an_unknown_model_becomes_a_plain_file_bit_for_bit(run, tmp_path):
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(3), "b.c": torch.arange(4).bfloat16()}
    torch.save(tensors, tmp_path / "x.pt")
    assert run("convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors").code == 0
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    outcome = run("convert", tmp_path / "x.pt", "-o", tmp_path / "folder", "--json")
    assert outcome.code == 1 and "no model that dite convert knows" in outcome.document["error"]["what"]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(run, tmp_path):
    torch.save({"a": torch.zeros(1), "b": Trap(str(tmp_path / "was-run"))}, tmp_path / "x.pt")
    outcome = run("convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors", "--json")
    assert outcome.code == 1 and outcome.document["error"]["type"] == "CheckpointError"
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("data", "flags", "word"),
    [
        (pickle.dumps([1, 2]), (), "x.pt"),
        (b"not a pickle", (), "x.pt"),
        (None, ("--max-bytes", 10), "at most 10"),
        (None, ("--max-tensors", 1), "at most 1 "),
        (None, ("--max-memory", 10**8), "memory"),
    ],
)
def test_what_is_no_state_dict_or_beyond_a_limit_is_refused(run, tmp_path, data, flags, word):
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.pt")
    if data is not None:
        (tmp_path / "x.pt").write_bytes(data)
    outcome = run("convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors", *flags, "--json")
    assert outcome.code == 1 and word in str(outcome.document["error"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_an_output_that_exists_or_a_source_that_does_not_is_a_usage_error(run, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    (tmp_path / "y.safetensors").write_text("")
    assert run("convert", tmp_path / "x.pt", "-o", tmp_path / "y.safetensors").code == 2
    assert run("convert", tmp_path / "no.pt", "-o", tmp_path / "z.safetensors").code == 2
