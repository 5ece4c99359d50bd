"""The quantizer kernel: the reference's codes, bit for bit."""

import pytest
import torch

from dite_kernels import affine, hadamard
from dite_kernels.triton_kernels.quantize import CodeFormat, quantize, quantize_activations
from dite_kernels.triton_kernels.rotation import Transform

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, None), (1, 17, None), (5, 300, 16), (33, 130, 48), (7, 1152, 128), (3, 2500, None), (9, 40, 8), (6, 96, 64), (3, 2600, 1300)]
ARITHMETIC = [(8, False), (8, True), (4, False), (4, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_codes_scales_and_zero_points_are_the_reference_s(device, same, dtype, rows, columns, group_size):
    x = (torch.randn(rows, columns) * 3 + 0.5).to(dtype)
    x[-1] = 0
    for bits, symmetric in ARITHMETIC:
        found = quantize(x.to(device), CodeFormat(bits, group_size, symmetric))
        assert same(found, affine.quantize(x, bits, group_size, symmetric))


@pytest.mark.parametrize("group_size", [None, 16, 48])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_that_are_not_finite_stay_in_their_group_as_in_the_reference(device, same, group_size, symmetric):
    x = torch.randn(5, 100)
    x[0, 20], x[1, 20], x[2, 20], x[3, 20:22] = float("nan"), float("inf"), float("-inf"), torch.tensor([float("inf"), float("nan")])
    found = quantize(x.to(device), CodeFormat(8, group_size, symmetric))
    assert same(found, affine.quantize(x, 8, group_size, symmetric)) and found.scale[4].isfinite().all()


@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e38])
def test_ranges_at_the_ends_of_fp32_give_the_reference_s_codes(device, same, size):
    x = torch.randn(4, 64) * size
    assert same(quantize(x.to(device), CodeFormat(8, 16, False)), affine.quantize(x, 8, 16, False))


def test_shifted_codes_are_128_less(device, same):
    x = torch.randn(3, 70)
    plain, shifted = (quantize(x.to(device), CodeFormat(8, 32, False, shifted=shifted)) for shifted in (False, True))
    assert shifted.codes.dtype == torch.int8 and same((shifted.codes.int() + 128, *shifted[1:]), plain)


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("block", [128, 64, 4])
def test_smoothed_and_rotated_activations_get_the_exact_rotation_s_codes_or_their_neighbours(device, rows, columns, group_size, block):
    """The order of fp32 sums moves a value by a few ulps, and a code only across a rounding border."""
    x, sign = torch.randn(rows, columns).half(), hadamard.signs(columns, 1)
    smooth = (torch.rand(columns) + 0.5).bfloat16().float()
    exact = affine.quantize(hadamard.rotate((x * smooth.half()).float(), block, sign), 8, group_size, False)
    transform = Transform(smooth.to(device), sign.to(device), block)
    found = affine.Quantized(*(part.cpu() for part in quantize(x.to(device), CodeFormat(8, group_size, False), transform)))
    assert (found.codes.int() - exact.codes.int()).abs().max() <= 1 and (found.codes != exact.codes).float().mean() < 0.01
    torch.testing.assert_close(found.scale, exact.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [128, 256])
def test_bf16_and_fp32_rotate_too(device, block):
    x, sign = torch.randn(5, 300), hadamard.signs(300, 1)
    for dtype in (torch.bfloat16, torch.float32):
        found = quantize(x.to(device, dtype), CodeFormat(8), Transform(None, sign.to(device), block))
        exact = affine.quantize(hadamard.rotate(x.to(dtype).float(), block, sign), 8, None, False)
        assert (found.codes.cpu().int() - exact.codes.int()).abs().max() <= 1


def test_no_tokens_give_no_codes(device):
    found = quantize(torch.zeros(0, 40, device=device), CodeFormat(8, 16, False))
    assert [tuple(part.shape) for part in found] == [(0, 40), (0, 3), (0, 3)]


def test_a_token_s_codes_do_not_depend_on_the_other_tokens(device, same):
    x = torch.randn(37, 200).to(device)
    whole, alone = quantize(x, CodeFormat(8, None, False)), quantize(x[11:12], CodeFormat(8, None, False))
    assert same([part[11:12] for part in whole], alone)


def test_torch_knows_the_operator_s_outputs_without_running_it(device):
    arguments = (torch.randn(3, 40, device=device), 8, 16, False, None, 0, True)
    checks = torch.library.opcheck(quantize_activations, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(checks.values()) == {"SUCCESS"}
