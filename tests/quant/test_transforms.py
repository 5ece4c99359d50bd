"""Every transform leaves a layer's function as it is before anything is rounded, and survives saving and casting."""

import pytest
import torch
from torch import nn

from dite.quant.linear import QuantLinear
from dite.quant.scheme import ActivationScheme, LayerScheme, TransformScheme, WeightScheme
from dite.quant.transforms import low_rank, representable, smooth_scale

KINDS = ["none", "hadamard", "smooth", "smooth+hadamard"]


def scheme(kind, rank=0, bits=8, activation=None):
    transform = TransformScheme(kind=kind, **({"block": 32, "sign_seed": 1} if kind.endswith("hadamard") else {}))
    return LayerScheme(weight=WeightScheme(num_bits=bits, group_size=16), activation=activation, transform=transform, rank=rank)


def layer_of(linear, kind, rank=0, **options):
    x = torch.randn(300, linear.in_features)
    smooth = smooth_scale(x.abs().amax(0), linear.weight, 0.5)
    return QuantLinear.from_linear(linear, scheme(kind, rank, **options), smooth=smooth, factor=lambda weight, r: low_rank(weight, x.T @ x, r))


@pytest.mark.parametrize("columns", [1, 7, 48, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_transformed_layer_is_the_same_function_but_for_rounding(kind, rank, columns):
    torch.manual_seed(0)
    linear = nn.Linear(columns, 9)
    layer = layer_of(linear, kind, rank)
    x = torch.randn(5, 3, columns)
    assert (layer(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    # Exact before rounding: what is left of the weight after the codes is what rounding lost, within its bound.
    lost = (layer.dequantize() - linear.weight).norm()
    codes_lost = layer.scale.float().max() / 2 * (columns * 9) ** 0.5
    assert lost <= codes_lost * (1 if layer.smooth is None else layer.smooth.float().max()) + 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantized_weight_is_what_the_layer_computes_with(kind):
    torch.manual_seed(1)
    layer = layer_of(nn.Linear(48, 9), kind, rank=3, bits=4)
    x = torch.randn(4, 48)
    assert torch.allclose(layer(x), x @ layer.dequantize().T + layer.bias, atol=1e-5)


def test_smooth_scales_survive_every_dtype():
    scale = representable(torch.logspace(-8, 8, 200))
    assert all(torch.equal(scale.to(dtype).float(), scale) for dtype in (torch.bfloat16, torch.float16))


def test_smoothing_evens_out_inputs_and_keeps_dead_channels_finite():
    peaks = torch.tensor([100.0, 1.0, 0.0, 1e-30])
    multiplier = smooth_scale(peaks, torch.ones(3, 4), 0.5)
    assert torch.isfinite(multiplier).all() and (multiplier > 0).all() and multiplier[0] < multiplier[1]
    assert torch.isfinite(smooth_scale(torch.zeros(4), torch.zeros(3, 4), 0.5)).all()


def test_a_low_rank_part_of_full_rank_is_the_weight_and_more_rank_than_there_is_adds_zeros():
    torch.manual_seed(2)
    weight, x = torch.randn(6, 10), torch.randn(50, 10)
    for rank in (6, 9):
        down, up = low_rank(weight, x.T @ x, rank)
        assert down.shape == (rank, 10) and up.shape == (6, rank) and torch.allclose(up @ down, weight, atol=1e-4)


def test_a_low_rank_part_is_the_best_for_its_inputs():
    torch.manual_seed(3)
    weight, x = torch.randn(8, 12), torch.randn(400, 12) * torch.logspace(-1, 1, 12)
    plain, weighted = (up @ down for down, up in (low_rank(weight, None, 3), low_rank(weight, x.T @ x, 3)))
    assert ((weighted - weight) @ x.T).norm() < ((plain - weight) @ x.T).norm()


def test_a_low_rank_part_takes_over_what_is_hard_to_round():
    torch.manual_seed(4)
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight += 3 * torch.randn(32, 2) @ torch.randn(2, 64)
    x = torch.randn(100, 64)
    errors = [(layer_of(linear, "none", rank, bits=4, activation=ActivationScheme())(x) - linear(x)).norm() for rank in (0, 2)]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_a_layer_changes_no_smooth_scale(dtype):
    layer = layer_of(nn.Linear(48, 9), "smooth+hadamard", rank=2)
    before = layer.smooth.clone()
    layer.to(dtype)
    assert torch.equal(layer.smooth.float(), before) and layer.lowrank_up.dtype == dtype
    assert layer(torch.randn(2, 48, dtype=dtype)).dtype == dtype
