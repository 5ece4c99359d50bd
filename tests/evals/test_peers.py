"""evals/peers.py: what is counted as bytes, what is resumed, and that a setting's text is the call that is made. No peer library is needed."""

import importlib
import json
import sys

import pytest
import torch
from torch import nn

from dite.errors import QuantizationError

LAYERS = {"proj"}


@pytest.fixture
def peers():
    """The script; the folder it lies in is on the tests' path, as on its own."""
    return importlib.import_module("peers")


class Coded(torch.Tensor):
    """A tensor of a library's own class, as torchao's are: codes and scales inside, and the dtype the codes are meant to be."""

    @staticmethod
    def __new__(cls, qdata, scale, target_dtype=None):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)

    def __init__(self, qdata, scale, target_dtype=None):
        self.qdata, self.scale, self.target_dtype = qdata, scale, target_dtype

    def __tensor_flatten__(self):
        return ["qdata", "scale"], {}

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def state(**proj):
    """A state dict: an embedding of 10 elements, and `proj`, a linear of 8 × 6 with a bias, holding these tensors."""
    return {"embed.weight": torch.zeros(10), **{f"proj.{name.replace('__', '.')}": value for name, value in proj.items()}}


def test_a_linear_left_alone_is_counted_in_bf16_whatever_it_is_here(peers):
    found = state(weight=torch.zeros(8, 6), bias=torch.zeros(8))
    assert peers.stored_bytes(found, LAYERS) == (2 * (10 + 48 + 8),) * 2
    assert peers.touched(found, LAYERS) == set()


def test_packed_int4_is_half_a_byte_an_element_and_every_other_tensor_is_what_it_is(peers):
    found = state(
        weight=torch.zeros(24, dtype=torch.uint8), scale=torch.zeros(8, 2), zero_point=torch.zeros(8, 2, dtype=torch.int8), bias=torch.zeros(8)
    )
    assert peers.stored_bytes(found, LAYERS) == (2 * 10 + 24 + 4 * 16 + 16 + 2 * 8,) * 2
    assert peers.touched(found, LAYERS) == LAYERS


def test_svd_factors_and_padding_count(peers):
    found = state(
        weight=torch.zeros(8, 6, dtype=torch.int8), svd_up=torch.zeros(8, 3, dtype=torch.bfloat16), svd_down=torch.zeros(3, 6, dtype=torch.bfloat16)
    )
    assert peers.stored_bytes(found, LAYERS)[0] == 20 + 48 + 2 * (24 + 18)
    padded = state(weight=torch.zeros(16, 6, dtype=torch.int8))
    assert peers.stored_bytes(padded, LAYERS)[0] == 20 + 96


@pytest.mark.parametrize(("target", "codes"), [(torch.int4, 24), (torch.int3, 18), (torch.int8, 48), (None, 48)])
def test_codes_in_whole_bytes_are_counted_so_and_packed_beside_it(peers, target, codes):
    tensor = Coded(torch.zeros(8, 6, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.bfloat16), target)
    assert peers.stored_bytes(state(weight=tensor, bias=torch.zeros(8)), LAYERS) == (20 + 48 + 16 + 16, 20 + codes + 16 + 16)


def test_a_layer_owns_what_goes_on_after_a_dot(peers):
    layers = {"blocks.1.q", "blocks.1.out.0"}
    names = ["blocks.1.q.weight.qdata", "blocks.1.q", "blocks.1.out.0.bias", "blocks.1.out.weight", "blocks.11.q.weight", "xblocks.1.q.weight"]
    assert [peers.owner(name, layers) for name in names] == ["blocks.1.q", "blocks.1.q", "blocks.1.out.0", None, None, None]


class Doubled(nn.Linear):
    """Stands for a quantized linear."""

    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight) + (0 if self.bias is None else self.bias)


class Squared(nn.Linear):
    """Quantizes activations, in a way."""

    def forward(self, x):
        return super().forward(x * x)


@pytest.mark.parametrize("bias", [True, False])
def test_an_expanded_layer_does_what_the_layer_did(peers, bias):
    model = nn.ModuleDict({"proj": Doubled(6, 8, bias=bias)})
    x = torch.randn(5, 6)
    with torch.no_grad():
        wanted = model["proj"](x)
        peers.expand_(model, LAYERS)
        assert type(model["proj"]) is nn.Linear
        torch.testing.assert_close(model["proj"](x), wanted)


def test_a_layer_that_is_no_matrix_is_not_expanded(peers):
    with pytest.raises(QuantizationError, match="can't be expanded"):
        peers.expand_(nn.ModuleDict({"proj": Squared(6, 8)}), LAYERS)


def test_a_row_says_the_call_that_is_made(peers):
    from dite_evals.peer_calls import Named, Peer

    library = type(sys)("library")
    library.PerGroup = lambda size: ("group", size)
    peer = Peer("torchao", "int4", 64, {"granularity": Named("PerGroup", (64,)), "dtype": Named("torch.int4"), "n": 1}, "Config")
    assert str(peer) == "quantize_(transformer, Config(granularity=PerGroup(64), dtype=torch.int4, n=1), filter_fn=LAYERS)"
    assert peer.values(library) == {"granularity": ("group", 64), "dtype": torch.int4, "n": 1}


def test_no_two_peers_share_a_row(peers):
    keys = [(peer.name, peer.group_size) for peer in peers.PEERS]
    assert len(set(keys)) == len(keys)


@pytest.fixture
def run(peers, monkeypatch, tmp_path):
    """Runs the script with pretended measurements; returns which were made, and the rows."""

    def go(*flags):
        made = []

        def fidelity(peer, arguments, dtype):
            made.append((peer.name, peer.group_size, dtype))
            if peer.name == "sdnq int4" or (peer.name == "sdnq uint4" and dtype == "float32"):
                raise RuntimeError("no\nkernel")
            return {"dtype": dtype, "bytes": 1}

        monkeypatch.setattr(peers, "fidelity", fidelity)
        monkeypatch.setattr(peers, "version_of", lambda peer: "1")
        monkeypatch.setattr(sys, "argv", ["peers.py", "--out", str(tmp_path / "peers.json"), *flags])
        peers.main()
        return made, json.loads((tmp_path / "peers.json").read_text())["rows"]

    return go


def test_a_run_goes_on_after_the_rows_that_are_there(run):
    made, _ = run("--peers", "sdnq int8")
    assert made == [("sdnq int8", None, "float32")]
    made, rows = run("--peers", "optimum-quanto;sdnq int8")
    assert {name for name, *_ in made} == {"optimum-quanto qint8 weights", "optimum-quanto qint4 weights", "optimum-quanto qint4 weights, HQQ"}
    assert [row["name"] for row in rows][-1] == "sdnq int8" and len(rows) == 5
    assert run("--peers", "optimum-quanto;sdnq int8")[0] == []


def test_a_setting_that_fails_or_is_declined_has_a_row_that_says_why(run):
    made, rows = run("--peers", "sdnq int4;sdnq uint4;optimum-quanto qint8 activations, qint8 weights")
    errors = {row["name"]: row.get("error", "") for row in rows}
    assert errors["sdnq int4"] == "float32: RuntimeError: no; bfloat16: RuntimeError: no"
    assert errors["sdnq uint4"] == "" and rows[-1]["dtype"] == "bfloat16" and rows[-1]["refused"] == "float32: RuntimeError: no"
    assert errors["optimum-quanto qint8 activations, qint8 weights"].startswith("not run: ") and len(made) == 8


def test_fid_is_added_to_the_rows_that_ran_and_once(run, peers, monkeypatch):
    asked = []

    def evaluate(pipe, protocol, n):
        asked.append((pipe, protocol, n))
        return dict.fromkeys(("fid", "interval", "fid_infinity", "extractor", "seconds"), 0) | {"n": n}

    monkeypatch.setattr(peers, "build", lambda peer, model, dtype: (f"{peer.name} {dtype}", 0.0))
    monkeypatch.setattr(peers.dite, "evaluate", evaluate)
    run("--peers", "sdnq int8")
    for _ in range(2):
        made, rows = run("--peers", "sdnq int8;sdnq int4", "--fid", "50")
        assert asked == [("sdnq int8 bfloat16", "cifar10-5k", 50)] and "sdnq int8" not in [name for name, *_ in made]
    assert [row.get("fid", {}).get("n") for row in rows] == [50, None, None]


def test_a_document_of_another_configuration_is_left_as_it_is(run):
    run("--peers", "sdnq int8")
    with pytest.raises(SystemExit, match="was made with"):
        run("--peers", "sdnq int8", "--n", "7")


def test_an_unknown_peer_is_named(run):
    with pytest.raises(SystemExit, match="no peer is called 'gptq'"):
        run("--peers", "gptq")


def test_sdnq_quantizes_the_layers_it_is_given_and_no_others(peers):
    pytest.importorskip("sdnq", reason="sdnq is a peer that is measured, not a dependency; see evals/peers-requirements.txt")
    model = nn.ModuleDict({"proj": nn.Linear(256, 128), "project": nn.Linear(256, 128)})
    peer = next(peer for peer in peers.PEERS if (peer.name, peer.group_size) == ("sdnq uint4", 128))
    peer.quantize_(model, LAYERS)
    assert peers.touched(model.state_dict(), LAYERS | {"project"}) == LAYERS
    scales = 2 * 4 * 128 * 2  # scale and zero point of 128 rows × 2 groups, in float32
    assert peers.stored_bytes(model.state_dict(), LAYERS)[0] == 128 * 256 // 2 + scales + 2 * 128 + 2 * (128 * 256 + 128)
