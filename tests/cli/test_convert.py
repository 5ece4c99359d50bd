"""`dite convert`: the original DiT's names become diffusers', a pickle that wants more than tensors is not obeyed, and limits hold."""

import copy
import math
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import dite
from dite.checkpoint.pickle_reader import state_dict_of
from dite.checkpoint.upstream_dit import model_of
from dite.errors import CheckpointError
from dite.outputs import OutputLock


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


def changed(upstream, name, tensor=None, **more):
    """The state dict with one tensor replaced, or left out."""
    tensors = {key: value.clone() for key, value in upstream.state_dict().items() if key != name}
    return tensors | ({} if tensor is None else {name: tensor}) | more


def refusal(tensors, heads=3, max_bytes=10**9):
    with pytest.raises(CheckpointError) as raised:
        model_of(tensors, heads, max_bytes)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (48,)),
        ("pos_embed", (1, 15, 48)),
        ("pos_embed", (1, 0, 48)),
        ("x_embedder.proj.weight", (48, 16)),
        ("x_embedder.proj.weight", (48, 4, 0, 0)),
        ("x_embedder.proj.weight", (0, 4, 2, 2)),
        ("x_embedder.proj.weight", (48, 4, 2, 3)),
        ("x_embedder.proj.weight", (46, 4, 2, 2)),
        ("x_embedder.proj.bias", ()),
        ("t_embedder.mlp.0.weight", (48, 128)),
        ("y_embedder.embedding_table.weight", (1, 48)),
        ("y_embedder.embedding_table.weight", (11,)),
        ("final_layer.linear.weight", (30, 48)),
        ("final_layer.linear.weight", (0, 48)),
        ("blocks.1.attn.qkv.weight", (1, 48)),
        ("blocks.1.attn.qkv.bias", (1,)),
        ("blocks.x.y", (3,)),
        ("blocks.5.weight", (3,)),
        ("blocks.", (3,)),
        ("blocks.01.attn.proj.weight", (48, 48)),
        ("y_embedder.embedding_table.bias", (48,)),
    ],
)
def test_a_tensor_that_fits_no_dit_is_named_with_its_shape(upstream, name, shape):
    said = refusal(changed(upstream, name, torch.zeros(shape)))
    assert name in said and f"its shape is {shape}" in said


@pytest.mark.parametrize("name", ["pos_embed", "x_embedder.proj.bias", "t_embedder.mlp.2.weight", "blocks.1.mlp.fc2.bias"])
def test_a_tensor_that_is_missing_is_named(upstream, name):
    assert f"{name} is missing" in refusal(changed(upstream, name))


@pytest.mark.parametrize("index", [3_000_000, 2])
def test_a_block_of_one_tensor_makes_no_blocks(upstream, monkeypatch, index):
    import diffusers

    monkeypatch.setattr(diffusers, "DiTTransformer2DModel", lambda **_: pytest.fail("a model was built"))
    name = f"blocks.{index}.attn.proj.weight"
    said = refusal(changed(upstream, name, torch.zeros(48, 48)))
    assert (name in said and "blocks.0 to blocks.2" in said) if index > 2 else "blocks.2.attn.qkv.weight is missing" in said


def test_blocks_with_a_gap_are_refused(upstream):
    tensors = {name.replace("blocks.1.", "blocks.2."): tensor for name, tensor in upstream.state_dict().items()}
    assert "blocks.2." in refusal(tensors)


def test_a_model_that_diffusers_makes_much_larger_than_its_file_is_not_made(upstream):
    assert "this DiT is too large" in refusal(upstream.state_dict(), max_bytes=300_000)


@pytest.mark.parametrize("heads", [-3, 0, 5, None])
def test_heads_that_cannot_be_are_refused(upstream, heads):
    assert "--heads" in refusal(upstream.state_dict(), heads)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_usual_floats_are_refused(upstream, dtype):
    said = refusal(changed(upstream, "blocks.0.mlp.fc1.bias", torch.zeros(192).to(dtype)))
    assert "blocks.0.mlp.fc1.bias" in said and str(dtype) in said


@pytest.mark.parametrize("off", [1e-3, 0.5])
def test_positions_that_were_trained_are_refused(upstream, off):
    table = upstream.pos_embed.detach().clone()
    table[0, 3, 5] += off
    said = refusal(changed(upstream, "pos_embed", table))
    assert "pos_embed" in said and "(1, 16, 48)" in said and "rounding" in said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_sines_are_known_in_every_dtype_and_weights_keep_theirs(upstream, dtype):
    model = model_of(upstream.to(dtype).state_dict(), 3, 10**9)
    assert model.dtype == dtype and torch.equal(model.pos_embed.proj.weight, upstream.x_embedder["proj"].weight)


def test_a_double_beyond_single_precision_stays_what_it_is(upstream):
    bias = torch.full((48,), 1e300, dtype=torch.float64)
    assert torch.equal(model_of(changed(upstream, "x_embedder.proj.bias", bias), 3, 10**9).pos_embed.proj.bias, bias)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "pos_embed"])
def test_weights_that_are_no_numbers_are_refused_by_name(upstream, name, value):
    tensors = copy.deepcopy(upstream.state_dict())
    tensors[name].view(-1)[7] = value
    said = refusal(tensors)
    assert name in said and "NaN or inf" in said


def test_no_folder_is_left_of_a_model_that_is_refused(upstream, run, tmp_path):
    torch.save(changed(upstream, "blocks.0.attn.proj.bias", torch.full((48,), math.nan)), tmp_path / "dit.pt")
    outcome = run("convert", tmp_path / "dit.pt", "-o", tmp_path / "dit", "--heads", 3, "--json")
    assert outcome.code == 1 and "blocks.0.attn.proj.bias" in outcome.document["error"]["what"]
    assert [path.name for path in tmp_path.iterdir()] == ["dit.pt"]


W, STEP = {"w": torch.ones(2)}, torch.tensor(3)


@pytest.mark.parametrize(
    ("loaded", "taken_from"),
    [
        (W, ""),
        ({"model": W, "step": STEP}, "model"),
        ({"ema": {"decay": 0.9}, "model": W}, "model"),
        ({"ema": {"decay": torch.tensor(0.9)}, "model": W}, "model"),
        ({"ema": W, "model": {"w": torch.zeros(2)}}, "ema"),
        ({"ema": {"decay": STEP, "model": W}, "model": {}}, "ema.model"),
        ({"state_dict": {"model": {"module": W}}, "optimizer": {"state": {}}}, "state_dict.model.module"),
        ({"model": torch.ones(2)}, ""),
        ({"model": {"scale": STEP}}, "model"),
    ],
)
def test_the_usual_wrappers_are_opened(loaded, taken_from):
    where, found = state_dict_of(loaded)
    assert where == taken_from and all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    assert "ema" not in taken_from or torch.equal(found["w"], W["w"])


def itself(**more):
    """A dict that lies in itself, under several keys."""
    loaded = dict(more)
    loaded |= dict.fromkeys(("model", "ema", "module"), loaded)
    return loaded


@pytest.mark.parametrize(
    ("loaded", "word"),
    [
        (itself(), "no tensors"),
        (itself(step=STEP), "is no tensor"),
        ({"model": {"w": torch.ones(2), "name": "x"}}, "model.name is no tensor"),
        ({"model": {"model": {"model": {"model": W}}}}, "at most 3 deep"),
        ({}, "no tensors"),
        ([W], "a list"),
    ],
)
def test_what_leads_to_no_state_dict_is_said(loaded, word):
    with pytest.raises(ValueError, match=word):
        state_dict_of(loaded)


def test_a_checkpoint_that_holds_itself_is_refused_at_once(run, tmp_path):
    torch.save(itself(), tmp_path / "x.pt")
    outcome = run("convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors", "--max-seconds", 60, "--json")
    assert outcome.code == 1 and "no tensors" in outcome.document["error"]["why"]


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
def test_one_run_at_a_time_writes_an_output(run, tmp_path, name):
    torch.save(W, tmp_path / "x.pt")
    with OutputLock(tmp_path / name):
        outcome = run("convert", tmp_path / "x.pt", "-o", tmp_path / name, "--json")
    assert outcome.code == 2 and outcome.document["error"]["type"] == "OutputInUse"


def test_an_output_that_came_in_the_meantime_is_kept(run, tmp_path, monkeypatch):
    from dite.checkpoint import convert

    output, header = tmp_path / "x.safetensors", convert.read_header
    torch.save(W, tmp_path / "x.pt")
    monkeypatch.setattr(convert, "read_header", lambda file: (output.write_text("other"), header(file)))
    assert run("convert", tmp_path / "x.pt", "-o", output).code == 2 and output.read_text() == "other"


def test_a_file_may_be_read_by_whom_the_umask_lets(run, tmp_path):
    torch.save(W, tmp_path / "x.pt")
    assert run("convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors").code == 0
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "x.pt").stat().st_mode


def test_what_a_killed_run_left_is_gone_after_the_next(run, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    command = [sys.executable, "-m", "dite", "convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:  # the source, the lock, what is unfinished
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert any("partial" in path.name or "convert" in path.name for path in tmp_path.iterdir())
    assert run("convert", tmp_path / "x.pt", "-o", tmp_path / "x.safetensors").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt", "x.safetensors"]
