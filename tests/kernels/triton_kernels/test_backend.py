"""The triton backend as layers see it."""

import pytest
import torch

from dite_kernels import backends, reference
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight
from dite_kernels.triton_kernels.backend import BREAK_EVEN_TOKENS

FP32_TOLERANCE = 2e-5  # a few fp32 additions in another order, as for every backend


def build(device, tokens, weight_bits=4, activation=(8, False, False)):
    spec = LinearSpec(150, 12, weight_bits, 64, False, *activation)
    packed = quantize_weight(torch.randn(12, 150), spec)
    moved = QuantTensor(*(part.to(device) for part in (packed.qdata, packed.scale, packed.zero_point)))
    return spec, packed, moved, torch.randn(tokens, 150), torch.randn(12)


@pytest.mark.parametrize("tokens", [0, 1, BREAK_EVEN_TOKENS - 1, BREAK_EVEN_TOKENS, 100])
@pytest.mark.parametrize("weight_bits", [4, 6, 8])
def test_a_layer_gives_the_reference_s_output_on_both_sides_of_the_break_even(device, tokens, weight_bits):
    spec, packed, moved, x, bias = build(device, tokens, weight_bits)
    backend = backends.select(spec, torch.device(device), "triton")
    y = backend.linear(x.to(device), backend.prepare(moved, spec, x.dtype), bias.to(device), spec).cpu()
    expected = reference.linear(x, packed, bias, spec)
    assert y.shape == expected.shape and ((y - expected).abs() <= FP32_TOLERANCE * max(1.0, expected.abs().max().item() if tokens else 1.0)).all()


def test_a_compiled_layer_is_one_graph_with_the_same_output(device):
    spec, _, moved, x, bias = build(device, 70)
    backend = backends.select(spec, torch.device(device), "triton")
    prepared = backend.prepare(moved, spec, x.dtype)

    def layer(x):
        return torch.relu(backend.linear(x * 2, prepared, bias.to(device), spec))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.to(device)), layer(x.to(device)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a card")
def test_a_captured_layer_replays_on_new_inputs(device):
    spec, _, moved, x, bias = build(device, 70)
    backend = backends.select(spec, torch.device(device), "triton")
    prepared, x, bias = backend.prepare(moved, spec, x.dtype), x.to(device), bias.to(device)
    backend.linear(x, prepared, bias, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.linear(x, prepared, bias, spec)
    x.mul_(-2)
    graph.replay()
    assert torch.equal(y, backend.linear(x, prepared, bias, spec))
