"""Every backend against the exact reference."""

import pytest
import torch

from dite_kernels import backends, reference
from dite_kernels.affine import quantize
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight

# Both sides round the same integers' sums to fp32; they differ by the order of a few fp32 additions.
FP32_TOLERANCE = 2e-5
NAMES = [name for name in backends.BACKENDS if name != "triton"]  # needs a card or an interpreter: see triton_kernels/
SHAPES = [(1, 1, 1, None), (1, 7, 3, 16), (9, 300, 5, 128), (5, 33, 1, 32), (17, 129, 8, 128), (3, 256, 11, None), (8, 48, 6, 16)]
ARITHMETIC = [(None, False, False), (8, False, False), (8, True, False), (8, False, True), (4, True, False)]


def build(k, n, group_size, weight_bits=4, weight_symmetric=False, activation=(8, False, False)):
    spec = LinearSpec(k, n, weight_bits, group_size, weight_symmetric, *activation)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k + n))
    return spec, weight, quantize_weight(weight, spec)


def run(name, x, packed, bias, spec):
    backend = backends.select(spec, x.device, name)
    return backend.linear(x, backend.prepare(packed, spec, x.dtype), bias, spec)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ARITHMETIC)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (6, True), (8, False)])
def test_a_backend_agrees_with_the_reference(name, shape, activation, bits, symmetric):
    m, k, n, group_size = shape
    spec, _, packed = build(k, n, group_size, bits, symmetric, activation)
    if spec.activation_bits and backends.BACKENDS[name].refusal(spec, torch.device("cpu")):
        with pytest.raises(backends.BackendUnavailable):
            backends.select(spec, torch.device("cpu"), name)
        return
    x, bias = torch.randn(m, k), torch.randn(n)
    expected = reference.linear(x, packed, bias, spec)
    assert (run(name, x, packed, bias, spec) - expected).abs().max() <= FP32_TOLERANCE * max(1, expected.abs().max().item())


# fp16 has 11 significant bits, bf16 has 8; weights, products and results are each rounded once.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("activation", ARITHMETIC)
def test_a_backend_agrees_with_the_reference_at_half_precision(name, dtype, tolerance, activation):
    spec, _, packed = build(300, 16, 64, 4, False, activation)
    x, bias = torch.randn(20, 300).to(dtype), torch.randn(16)
    y, expected = run(name, x, packed, bias, spec), reference.linear(x.float(), packed, bias, spec)
    assert y.dtype == dtype and (y.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_codes_do_not_overflow_fp16(name):
    spec = LinearSpec(512, 4, 8, 128, activation_bits=8)
    y = run(name, torch.ones(2, 512).half(), quantize_weight(torch.ones(4, 512), spec), None, spec)
    assert (y.float() - 512).abs().max() < 2


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_can_stand_in_a_graph_that_wants_gradients(name):
    spec, _, packed = build(64, 8, 16)
    x = torch.randn(3, 64, requires_grad=True)
    assert run(name, x * 1, packed, None, spec).isfinite().all()


def test_a_group_larger_than_the_row_allocates_no_more_than_the_row():
    spec = LinearSpec(48, 4, 4, 16_000_000_000, activation_bits=8)
    packed = quantize_weight(torch.randn(4, 48), spec)
    assert run("reference", torch.randn(2, 48), packed, None, spec).shape == (2, 4)


def test_forcing_int_mm_leaves_weight_only_layers_to_floats_and_says_so():
    assert backends.select(LinearSpec(64, 8, 4, 16), torch.device("cpu"), "int_mm").name == "expanded"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_accumulates_exactly(shape):
    m, k, n, group_size = shape
    spec, _, packed = build(k, n, group_size, 8)
    x = quantize(torch.randn(m, k), 8, None, False)
    codes, zeros = packed.codes(spec).long(), packed.zeros(spec).long()
    width = group_size or k
    for group, accumulator in enumerate(reference.accumulate(x.codes, x.zero_point, packed, spec)):
        columns = slice(group * width, (group + 1) * width)
        exact = (x.codes[:, columns].long() - x.zero_point.long()) @ (codes[:, columns] - zeros[:, group, None]).T
        assert accumulator.dtype == torch.int32 and torch.equal(accumulator.long(), exact)


def test_the_reference_is_close_to_the_float_layer_at_eight_bits():
    spec, weight, packed = build(300, 20, 64, 8)
    x = torch.randn(50, 300)
    exact = x @ weight.T
    assert (reference.linear(x, packed, None, spec) - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_is_not_finite_spoils_only_itself(name):
    spec, _, packed = build(64, 8, 16)
    x = torch.randn(4, 64)
    x[2, 5] = float("nan")
    y = run(name, x, packed, None, spec)
    assert not y[2].isfinite().any() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "int_mm"])
def test_integer_backends_give_a_token_the_same_bits_whatever_its_neighbours(name):
    spec, _, packed = build(300, 5, 128)
    x = torch.randn(33, 300)
    assert torch.equal(run(name, x, packed, None, spec)[7:8], run(name, x[7:8], packed, None, spec))


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_no_rows(name):
    spec, _, packed = build(64, 8, 16)
    assert run(name, torch.zeros(0, 64), packed, torch.zeros(8), spec).shape == (0, 8)


def test_groups_that_could_overflow_int32_are_refused():
    spec = LinearSpec(40000, 1, 8, None, activation_bits=8)
    packed = QuantTensor(torch.zeros(1, 40000, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most 33025"):
        reference.linear(torch.zeros(1, 40000), packed, None, spec)


def test_the_environment_can_force_a_backend(monkeypatch):
    spec, _, _ = build(64, 8, 16)
    monkeypatch.setenv("DITE_BACKEND", "reference")
    assert backends.select(spec, torch.device("cpu")).name == "reference"


def test_an_unknown_backend_is_refused_with_the_known_ones():
    spec, _, _ = build(64, 8, 16)
    with pytest.raises(backends.BackendUnavailable, match="int_mm"):
        backends.select(spec, torch.device("cpu"), "turbo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qdata": torch.zeros(8, 31, dtype=torch.uint8)}, "qdata"),
        ({"scale": torch.full((8, 4), float("nan"))}, "finite"),
        ({"scale": torch.zeros(8, 4)}, "> 0"),
        ({"scale": torch.ones(8, 4, dtype=torch.bfloat16)}, "float16 or"),
        ({"zero_point": None}, "zero_point"),
    ],
)
def test_a_damaged_quant_tensor_is_refused(change, message):
    spec, _, packed = build(64, 8, 16)
    with pytest.raises(ValueError, match=message):
        QuantTensor(**(vars(packed) | change)).validate(spec)
