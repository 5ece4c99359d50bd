"""The forward bench: what is run beside the baseline, and that what can't run is a note. No peer library is needed, no time is measured."""

import pytest
import torch

from dite.errors import UsageError
from dite_evals import random_models, speed, speed_peers
from dite_evals.memory import held_bytes, stored_bytes
from dite_evals.peer_calls import Peer
from dite_kernels import backends
from dite_kernels.bench.timing import Budget


@pytest.fixture
def measure(build_model):
    """Runs the bench on a small bf16 model with calls that all take a second; returns the document."""
    from dite.models.families import example_inputs

    model = build_model("DiTTransformer2DModel").bfloat16()

    def go(**asked):
        settings = speed.Asked(**{"recipes": ["w8a8"], "budget": Budget(1)} | asked)
        return speed.bench_forward(model, example_inputs(model), settings, clock=lambda call: 1.0)

    return go


@pytest.fixture
def quantizer(monkeypatch):
    """Lets a function stand in for the call of every peer, and for their being installed."""

    def stand_in(function):
        monkeypatch.setattr(Peer, "quantize_", lambda self, transformer, layers: function(transformer, layers))
        monkeypatch.setattr(speed_peers, "version", lambda library: "1.0")

    return stand_in


def test_a_library_that_is_not_installed_is_a_note(measure, monkeypatch):
    def absent(library):
        raise speed_peers.PackageNotFoundError(library)

    monkeypatch.setattr(speed_peers, "version", absent)
    document = measure(peers=["quanto"])
    assert len(document["rows"]) == 2 and document["notes"] == ["optimum-quanto qint8 weights: optimum-quanto is not installed"]


def test_a_peer_gets_the_token_linears_of_the_first_recipe(measure, quantizer):
    given = []
    quantizer(lambda transformer, layers: given.append(layers))
    row = measure(peers=["sdnq"])["rows"][-1]
    assert given[0] and all(name.startswith("transformer_blocks.") and "norm" not in name for name in given[0])
    assert (row["backend"], row["version"], row["layers"]) == ("sdnq int8, quantized matmul", "1.0", len(given[0]))


def test_a_peer_gets_a_copy(measure, quantizer):
    def spoil(transformer, layers):
        for parameter in transformer.parameters():
            parameter.zero_()

    quantizer(spoil)
    baseline, _, spoiled = measure(peers=["quanto"])["rows"]
    assert baseline["output_relative_error"] == 0 and spoiled["output_relative_error"] > 0.5


def test_a_peer_that_fails_is_a_note_whenever_it_fails(measure, quantizer):
    class Failing(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError("no kernel\nand more")

    quantizer(lambda transformer, layers: transformer.set_submodule(layers[0], Failing(1, 1)))
    assert measure(peers=["sdnq"])["notes"] == ["sdnq int8, quantized matmul: failed, RuntimeError: no kernel"]
    quantizer(lambda transformer, layers: 1 // 0)
    assert measure(peers=["sdnq"])["notes"] == ["sdnq int8, quantized matmul: failed, ZeroDivisionError: integer division or modulo by zero"]


def test_compiled_models_are_measured_beside_eager_ones(measure, quantizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    quantizer(lambda transformer, layers: None)
    names = [row["name"] for row in measure(peers=["torchao"], compiled=True)["rows"]]
    assert names[:2] == ["torch-bf16-eager", "torch-bf16-compiled"] and "torchao int8 activations, int8 weights, compiled" in names


def test_what_a_backend_unpacks_and_keeps_counts_as_held():
    layer = torch.nn.Linear(10, 4)
    both = torch.nn.Sequential(layer, layer)
    assert stored_bytes(both) == 2 * held_bytes(both) == 2 * 4 * 44  # shared: twice in the state dict, once in memory
    layer.kept = ("key", {"weight": torch.zeros(3, 5), "view": layer.weight[:2]})
    assert held_bytes(both) == 4 * (44 + 15)


def test_expanded_weights_are_held_beside_the_packed_ones(measure):
    bf16, expanded, unpacked = measure(backends=["expanded", "dequantize"])["rows"]
    assert unpacked["held_bytes"] < bf16["held_bytes"] < expanded["held_bytes"] and expanded["weight_bytes"] == unpacked["weight_bytes"]


def test_a_backend_may_leave_conditioning_linears_to_another_and_no_token_linears(measure, monkeypatch):
    def choosy(refused):
        Choosy = type("Choosy", (backends.Expanded,), {"refusal": lambda self, spec, device: "no" if refused(spec) else None})
        monkeypatch.setitem(backends.BACKENDS, "choosy", Choosy("choosy", "for this test"))
        return measure(backends=["choosy"])

    assert [row["backend"] for row in choosy(lambda spec: spec.activation_bits is None)["rows"]][1:] == ["choosy"]
    document = choosy(lambda spec: spec.in_features == 192)  # the second linear of a feed-forward
    assert len(document["rows"]) == 1 and "ff.net.2: " in document["notes"][0]


def test_every_setting_is_one_that_peer_calls_knows():
    for settings in speed_peers.SETTINGS.values():
        assert all(not setting.peer.declined for setting in settings)


def test_inputs_of_one_sample_are_repeated_and_what_has_no_samples_is_not():
    inputs = {"x": torch.zeros(1, 4, 3), "ids": torch.zeros(16, 3), "more": {"size": torch.zeros(1, 2)}, "shapes": [(1, 4)], "flag": False}
    found = speed.batched(inputs, 3)
    assert found["x"].shape == (3, 4, 3) and found["ids"].shape == (16, 3) and found["more"]["size"].shape == (3, 2)
    assert found["shapes"] == [(1, 4)] * 3 and found["flag"] is False


def test_a_size_is_as_large_as_its_tokens():
    assert random_models.size_of("dit-xl-2", 1024)["sample_size"] == 64
    with pytest.raises(UsageError, match="no square picture"):
        random_models.size_of("dit-xl-2", 200)


def test_a_forward_of_a_batch_works_in_every_family(family_model):
    from dite.models.families import example_inputs

    with torch.no_grad():
        output = family_model(**speed.batched(example_inputs(family_model), 2))[0]
    assert len(output) == 2
