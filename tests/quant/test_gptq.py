"""GPTQ: better than rounding where it counts, and sound on degenerate inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.quant.gptq import SingularHessian, gptq, inverse_factor
from dite_kernels.quant_tensor import LinearSpec, quantize_weight


def problem(rows=24, columns=80, tokens=400, seed=0):
    """A weight and the second moments of correlated inputs with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, ::9] *= 6
    return torch.randn(rows, columns, generator=generator), x.T @ x


def error(weight, hessian, spec, tensor):
    tensor.validate(spec)
    difference = tensor.dequantize(spec) - weight
    return float(((difference @ hessian * difference).sum() / (weight @ hessian * weight).sum()).sqrt())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 48, None])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_each_step_lowers_the_error_of_the_outputs(bits, group_size, symmetric):
    weight, hessian = problem()
    spec = LinearSpec(80, 24, bits, group_size, symmetric)
    plain = gptq(weight, hessian, spec)
    best = gptq(weight, hessian, spec, ordered=True, shrink=True)
    errors = [error(weight, hessian, spec, tensor) for tensor in (quantize_weight(weight, spec), plain, best)]
    assert errors[2] < errors[1] < errors[0]


def test_with_independent_inputs_gptq_is_rounding():
    weight, _ = problem()
    spec = LinearSpec(80, 24, 4, 32)
    assert torch.equal(gptq(weight, torch.eye(80), spec).qdata, quantize_weight(weight, spec).qdata)


@given(rows=st.integers(1, 5), columns=st.integers(1, 70), tokens=st.integers(0, 90), group=st.sampled_from([16, 32, None]), ordered=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_any_number_of_tokens_gives_a_sound_tensor(rows, columns, tokens, group, ordered):
    weight, hessian = problem(rows, columns, max(tokens, 1), seed=columns)
    hessian = hessian if tokens else torch.zeros_like(hessian)
    spec = LinearSpec(columns, rows, 4, group)
    found = gptq(weight, hessian, spec, ordered=ordered, shrink=True)
    found.validate(spec)
    assert torch.isfinite(found.dequantize(spec)).all()


def test_a_column_that_calibration_never_excited_is_still_rounded_to_its_weight():
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    for options in ({}, {"ordered": True}, {"ordered": True, "shrink": True}):
        spec = LinearSpec(80, 24, 8, 16)
        found = gptq(weight, hessian, spec, **options)
        assert (found.dequantize(spec)[:, 5] - weight[:, 5]).abs().max() <= found.scale[:, 0].float().max() / 2 + 1e-6


def test_inputs_of_low_rank_are_damped():
    weight, _ = problem()
    x = torch.randn(3, 80)
    spec = LinearSpec(80, 24, 4, 32)
    assert error(weight, x.T @ x, spec, gptq(weight, x.T @ x, spec)) < error(weight, x.T @ x, spec, quantize_weight(weight, spec))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value):
    weight, hessian = problem()
    hessian[3, 3] = value
    with pytest.raises(SingularHessian):
        gptq(weight, hessian, LinearSpec(80, 24, 4, 32))


def test_the_factor_is_that_of_the_inverse():
    _, hessian = problem(columns=12)
    factor = inverse_factor(hessian).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(12)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(12, dtype=torch.float64), atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_an_outlier_that_no_input_reaches_is_left_out_of_the_range_only_when_asked():
    weight, hessian = problem()
    weight[:, 0] *= 20
    hessian[0], hessian[:, 0] = 0, 0
    hessian[0, 0] = 1e-6
    spec = LinearSpec(80, 24, 4, None)
    whole, shrunk = (error(weight, hessian, spec, gptq(weight, hessian, spec, ordered=True, shrink=shrink)) for shrink in (False, True))
    assert shrunk < 0.8 * whole
