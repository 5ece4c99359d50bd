"""LayerNorm, modulation and quantization in one kernel, against the three in plain torch."""

import pytest
import torch

from dite_kernels.affine import Quantized
from dite_kernels.triton_kernels.modulate import MOST_VALUES, modulate, modulate_activations, modulate_reference
from dite_kernels.triton_kernels.quantize import CodeFormat

SHAPES = [(2, 3, 1152, 128), (1, 1, 17, None), (2, 5, 96, 48), (3, 2, 300, 16), (1, 2, 3072, None)]


def inputs(batch, tokens, columns, dtype=torch.float32):
    x = torch.randn(batch, tokens, columns) * 2 + 1
    return x.to(dtype), (torch.randn(batch, columns) * 0.3).to(dtype), torch.randn(batch, columns).to(dtype)


def run(device, parts, *arithmetic) -> Quantized:
    return Quantized(*(part.cpu() for part in modulate(*(part.to(device) for part in parts), CodeFormat(*arithmetic))))


def agree(found: Quantized, expected: Quantized) -> bool:
    """Mean and variance differ by the order of their sums: a few ulps, and so a code at a rounding border."""
    apart = (found.codes.int() - expected.codes.int()).abs()
    torch.testing.assert_close(found.scale, expected.scale, rtol=2e-6, atol=0, equal_nan=True)
    return bool(apart.max() <= 1 and (apart > 0).float().mean() < 0.01 and (found.zero_point.int() - expected.zero_point.int()).abs().max() <= 1)


@pytest.mark.parametrize(("batch", "tokens", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_reference_s_or_their_neighbours(device, batch, tokens, columns, group_size, dtype):
    parts = inputs(batch, tokens, columns, dtype)
    for bits, symmetric in ((8, False), (4, True)):
        assert agree(run(device, parts, bits, group_size, symmetric), modulate_reference(*parts, CodeFormat(bits, group_size, symmetric)))


def test_a_constant_token_gives_its_shift(device):
    x, scale, shift = inputs(1, 2, 64)
    x[:] = 5.0
    assert agree(run(device, (x, scale, shift), 8, 16, False), modulate_reference(x, scale, shift, CodeFormat(8, 16)))


def test_a_token_that_is_not_finite_spoils_only_itself(device):
    x, scale, shift = inputs(2, 3, 100)
    x[0, 1, 7], x[1, 2, 50] = float("nan"), float("inf")
    found = run(device, (x, scale, shift), 8, 16, False)
    spoilt = torch.tensor([1, 5])
    assert found.scale[spoilt].isnan().all() and found.scale[[0, 2, 3, 4]].isfinite().all()


def test_shifted_codes_are_128_less(device):
    parts = inputs(2, 3, 96)
    plain, shifted = run(device, parts, 8, 32, False), run(device, parts, 8, 32, False, True)
    assert shifted.codes.dtype == torch.int8 and torch.equal(shifted.codes.int() + 128, plain.codes.int())


def test_a_token_too_long_for_one_program_is_refused():
    parts = (torch.empty(1, 1, MOST_VALUES + 1), torch.empty(1, MOST_VALUES + 1), torch.empty(1, MOST_VALUES + 1))
    with pytest.raises(ValueError, match="too long"):
        modulate(*parts, CodeFormat(8))


def test_torch_knows_the_operator_s_outputs_without_running_it(device):
    arguments = (*(part.to(device) for part in inputs(2, 3, 40)), 8, 16, False, 1e-6, True)
    checks = torch.library.opcheck(modulate_activations, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(checks.values()) == {"SUCCESS"}
