"""The integer product: exact sums, and an epilogue within a few roundings of the reference's."""

import dataclasses

import pytest
import torch

from dite_kernels import affine, reference
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight
from dite_kernels.triton_kernels import product
from dite_kernels.triton_kernels.quantize import CodeFormat, quantize
from dite_kernels.triton_kernels.weight import prepare

# tokens, in features, out features, group size
SHAPES = [
    (1, 17, 5, None),
    (5, 300, 70, 128),
    (33, 130, 9, 16),
    (70, 384, 80, 128),
    (17, 200, 100, 48),
    (9, 96, 8, 32),
    (130, 150, 30, 64),
    (70, 100, 80, None),
    (20, 600, 10, 256),
    (8, 1160, 9, None),
    (3, 2048, 5, 512),
]
WEIGHTS = [(4, False), (4, True), (6, False), (8, False), (8, True)]
# bits, per group, symmetric
ACTIVATIONS = [(8, False, False), (8, True, False), (8, False, True), (4, True, True)]
ROUNDING = 2.0**-24


def build(shape, weight, activation=(8, False, False)):
    tokens, columns, rows, group_size = shape
    spec = LinearSpec(columns, rows, weight[0], group_size, weight[1], *activation)
    return spec, quantize_weight(torch.randn(rows, columns), spec), torch.randn(tokens, columns) + 0.3, torch.randn(rows)


def moved(weight, device):
    """A prepared weight or a quantized tensor on a device."""
    parts = {name: part.to(device) for name, part in vars(weight).items() if isinstance(part, torch.Tensor)}
    return dataclasses.replace(weight, **parts)


def run(device, x, packed, bias, spec, dtype=torch.float32):
    codes = quantize(x.to(device), CodeFormat.for_product(spec))
    bias = None if bias is None else bias.to(device)
    return product.linear(codes, moved(prepare(packed, spec), device), bias, spec, dtype).cpu()


def size_of_terms(x, packed, bias, spec):
    """Σ over groups of |what is added|: what rounding errors are relative to."""
    codes = affine.quantize(x, spec.activation_bits, spec.activation_group_size, spec.activation_symmetric)
    sums = reference.accumulate(codes.codes, codes.zero_point, packed, spec).abs().float()
    scales = codes.scale.expand(-1, spec.groups).t()[:, :, None] * packed.scale.float().t()[:, None]
    return (sums * scales).sum(0) + bias.abs()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_the_product_is_the_reference_s_within_three_roundings_a_group(device, shape, weight, activation):
    spec, packed, x, bias = build(shape, weight, activation)
    error = (run(device, x, packed, bias, spec) - reference.linear(x, packed, bias, spec)).abs()
    assert (error <= 3 * (spec.groups + 1) * ROUNDING * size_of_terms(x, packed, bias, spec)).all()


@pytest.mark.parametrize("shape", [(5, 300, 9, 128), (17, 100, 5, 16), (4, 150, 3, 48), (3, 250, 4, None)])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_integer_sums_of_every_group_are_exact(device, shape, weight, activation):
    """With every scale 0 but one group's 1, the output is that group's sum; below 2^24 fp32 holds it exactly."""
    spec, packed, x, _ = build(shape, weight, activation)
    codes = affine.quantize(x, spec.activation_bits, spec.activation_group_size, spec.activation_symmetric)
    shifted = ((codes.codes.int() - 128).to(torch.int8), torch.ones_like(codes.scale), codes.zero_point)
    shifted, prepared = affine.Quantized(*(part.to(device) for part in shifted)), moved(prepare(packed, spec), device)
    for group, exact in enumerate(reference.accumulate(codes.codes, codes.zero_point, packed, spec)):
        scale = torch.zeros_like(prepared.scale)
        scale[group] = 1
        found = product.linear(shifted, dataclasses.replace(prepared, scale=scale), None, spec, torch.float32)
        assert torch.equal(found.cpu().long(), exact.long())


@pytest.mark.parametrize(("code", "zero"), [(0, 255), (255, 0)])
def test_the_largest_sums_of_the_longest_row_do_not_overflow(device, code, zero):
    columns = reference.MAX_GROUP
    spec = LinearSpec(columns, 2, 8, None, activation_bits=8)
    packed = QuantTensor(torch.full((2, columns), 255, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8))
    codes = torch.full((1, columns), code - 128, dtype=torch.int8, device=device)
    x = affine.Quantized(codes, torch.ones(1, 1, device=device), torch.full((1, 1), zero, dtype=torch.uint8, device=device))
    y = product.linear(x, moved(prepare(packed, spec), device), None, spec, torch.float32)
    assert (y.cpu() == torch.tensor(255 * (code - zero) * columns, dtype=torch.int32).float()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_within_one_ulp(device, dtype):
    spec, packed, x, bias = build((20, 300, 16, 64), (4, False))
    x = x.to(dtype)
    y, expected = run(device, x, packed, bias, spec, dtype), reference.linear(x.float(), packed, bias, spec)
    assert y.dtype == dtype
    slack = 1e-5 * expected.abs().max()  # near 0 the sum's own rounding counts for more than the output's
    assert ((y.float() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + slack).all()


def test_a_token_that_is_not_finite_spoils_only_itself(device):
    spec, packed, x, _ = build((4, 64, 8, 16), (4, False))
    x[2, 5] = float("nan")
    y = run(device, x, packed, None, spec)
    assert not y[2].isfinite().any() and y[[0, 1, 3]].isfinite().all()


def test_a_token_gets_the_same_bits_whatever_its_neighbours(device):
    spec, packed, x, bias = build((33, 300, 5, 128), (8, False))
    assert torch.equal(run(device, x, packed, bias, spec)[7:8], run(device, x[7:8], packed, bias, spec))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_repacked_weight_stands_for_the_same_numbers(shape, weight):
    spec, packed, _, _ = build(shape, weight)
    assert torch.equal(prepare(packed, spec).dequantize(spec, torch.float32), packed.dequantize(spec))


def test_four_bit_codes_stay_four_bits_where_groups_are_long():
    spec, packed, _, _ = build((1, 1152, 8, 128), (4, False))
    assert prepare(packed, spec).qdata.numel() == 1152 * 8 // 2


def test_a_group_that_could_overflow_is_refused(device):
    columns = reference.MAX_GROUP + 1
    spec = LinearSpec(columns, 1, 8, None, activation_bits=8)
    packed = QuantTensor(torch.zeros(1, columns, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most 33025"):
        run(device, torch.zeros(1, columns), packed, None, spec)


def test_torch_knows_the_operator_s_output_without_running_it(device):
    spec, packed, x, bias = build((5, 96, 7, 32), (8, False))
    weight = moved(prepare(packed, spec), device)
    codes = quantize(x.to(device), CodeFormat.for_product(spec))
    parts = (weight.qdata, weight.scale, weight.sums, weight.zero, bias.to(device))
    arguments = (*codes, *parts, 32, weight.packs_nibbles, weight.depth, True, torch.float16)
    checks = torch.library.opcheck(product.integer_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(checks.values()) == {"SUCCESS"}
