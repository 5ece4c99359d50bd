"""A quantized linear does the GELU after it along the way, and nobody can tell except by the time it takes."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers.models.activations import GELU

from dite.quant.apply import replace_
from dite.quant.linear import QuantLinear
from dite.quant.scheme import ActivationScheme, LayerScheme, TransformScheme, WeightScheme

SCHEME = LayerScheme(weight=WeightScheme(num_bits=8, group_size=32), activation=ActivationScheme(num_bits=8))
SCHEMES = [
    SCHEME,
    SCHEME.model_copy(update={"activation": None}),
    SCHEME.model_copy(update={"transform": TransformScheme(kind="hadamard", block=32)}),
]


def quantized(scheme=SCHEME, approximate="tanh"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(GELU(64, 48, approximate=approximate))
    replace_(model, "0.proj", QuantLinear.from_linear(model[0].proj, scheme))
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference", "expanded"])
def test_the_result_is_that_of_linear_and_gelu(scheme, approximate, backend):
    model, x = quantized(scheme, approximate), torch.randn(2, 9, 64)
    model[0].proj.backend = backend
    expected = torch.nn.functional.gelu(model[0].proj(x), approximate=approximate)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass():
    model, x = quantized(), torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_hooks_on_the_linear_are_called_with_its_own_output():
    model, x, seen = quantized(), torch.randn(3, 64), []
    model[0].proj.register_forward_hook(lambda _module, _args, y: seen.append(y))
    y = model(x)
    assert torch.allclose(torch.nn.functional.gelu(seen[0], approximate="tanh"), y)


def test_an_unquantized_linear_put_back_works_as_before():
    model, x, plain = quantized(), torch.randn(3, 64), torch.nn.Linear(64, 48)
    replace_(model, "0.proj", plain)
    assert torch.equal(model(x), torch.nn.functional.gelu(plain(x), approximate="tanh"))


def test_copies_compute_the_same():
    model, x = quantized(), torch.randn(3, 64)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert isinstance(twin[0], GELU) and torch.equal(twin(x), expected) and torch.equal(model(x), expected)


def test_the_class_is_found_by_its_name_in_a_process_that_has_fused_nothing():
    code = "from dite.quant import fused; from diffusers.models.activations import GELU; assert issubclass(fused.FusedGELU, GELU)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
