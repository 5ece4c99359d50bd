import copy
import threading

import pytest
import torch
from torch import nn

from dite.errors import QuantizationError, UnsupportedEnvironment, UnsupportedModel, UsageError
from dite.quant.linear import QuantLinear, set_backend
from dite.quant.scheme import ActivationScheme, LayerScheme, TransformScheme, WeightScheme
from dite.quant.standin import WeightStandIn

W4A8 = LayerScheme(weight=WeightScheme(num_bits=4, group_size=32), activation=ActivationScheme())


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(50, 7), W4A8)


def test_it_keeps_leading_dimensions_and_dtype(layer):
    assert layer(torch.randn(2, 3, 50)).shape == (2, 3, 7)
    assert layer(torch.randn(50)).shape == (7,)
    assert layer(torch.randn(0, 50)).shape == (0, 7)
    assert layer.bfloat16()(torch.randn(4, 50).bfloat16()).dtype == torch.bfloat16


def test_non_contiguous_input_gives_the_same_result(layer):
    x = torch.randn(50, 6)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_the_model_leaves_scales_and_codes_as_they_were(layer, cast):
    before = layer.scale.clone(), layer.qdata.clone()
    cast(layer)
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.scale, before[0]) and torch.equal(layer.qdata, before[1])
    assert layer.bias.dtype != torch.float32


def test_it_holds_buffers_and_no_parameters(layer):
    assert not list(layer.parameters()) and isinstance(layer.weight, WeightStandIn) and isinstance(layer, nn.Linear)
    assert set(layer.state_dict()) == {"qdata", "scale", "zero_point", "bias"}


def test_a_state_dict_with_fp32_scales_keeps_them_fp32(layer):
    other = QuantLinear(50, 7, W4A8)
    state = layer.state_dict() | {"scale": layer.scale.float() * 1.0001}
    other.load_state_dict(state)
    assert other.scale.dtype == torch.float32 and torch.equal(other.scale, state["scale"])


def test_loading_new_weights_after_a_forward_is_not_ignored(layer):
    x = torch.randn(3, 50)
    before = layer(x)
    layer.load_state_dict(QuantLinear.from_linear(nn.Linear(50, 7), W4A8).state_dict())
    assert not torch.equal(before, layer(x))


def test_a_copy_computes_the_same(layer):
    x = torch.randn(3, 50)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_symmetric_weights_store_no_zero_point():
    scheme = LayerScheme(weight=WeightScheme(num_bits=4, group_size=16, symmetric=True))
    assert QuantLinear.from_linear(nn.Linear(32, 3, bias=False), scheme).zero_point is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    linear = nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"blocks\.3\.ff can't be quantized\n1 of its 64"):
        QuantLinear.from_linear(linear, W4A8, "blocks.3.ff")


@pytest.mark.parametrize(("bits", "floor_db"), [(8, 40), (6, 28), (4, 15)])
def test_signal_to_noise_stays_above_its_floor(bits, floor_db):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64), torch.randn(100, 256)
    layer = QuantLinear.from_linear(linear, LayerScheme(weight=WeightScheme(num_bits=bits, group_size=64), activation=ActivationScheme()))
    noise = layer(x) - linear(x)
    assert 10 * torch.log10(linear(x).square().sum() / noise.square().sum()) > floor_db


def test_a_backend_that_cannot_run_a_layer_is_refused_and_changes_nothing():
    model = nn.Sequential(QuantLinear(32, 4, W4A8), QuantLinear(33, 4, W4A8))
    with pytest.raises(UnsupportedEnvironment, match="one column"):
        set_backend(model, "int_mm")
    with pytest.raises(UsageError, match=r"no backend named int_m\n.*\ndid you mean int_mm"):
        set_backend(model, "int_m")
    assert [layer.backend for layer in model] == ["auto", "auto"]


def test_weights_changed_after_a_forward_are_not_ignored(layer):
    x = torch.randn(3, 50)
    before = layer(x)
    layer.scale = layer.scale * 2
    assert not torch.equal(before, layer(x))


def test_weights_too_large_for_any_scale_are_refused():
    linear = nn.Linear(16, 1)
    torch.nn.init.constant_(linear.weight, 3e38)
    with torch.no_grad():
        linear.weight[0, 0] = -3e38
    with pytest.raises(QuantizationError, match="scale"):
        QuantLinear.from_linear(linear, W4A8, "huge")


HADAMARD = TransformScheme(kind="hadamard", block=16, sign_seed=3)


@pytest.mark.parametrize("backend", ["reference", "int_mm", "expanded", "dequantize"])
@pytest.mark.parametrize("transform", [TransformScheme(), HADAMARD])
def test_the_gradient_is_that_of_the_dequantized_weight(backend, transform):
    torch.manual_seed(0)
    layer, x, upstream = (
        QuantLinear.from_linear(nn.Linear(50, 7), W4A8.model_copy(update={"transform": transform})),
        torch.randn(2, 3, 50),
        torch.randn(2, 3, 7),
    )
    layer.backend = backend
    with torch.inference_mode():
        expected = layer(x)  # what it prepares here must do for training too
    y = layer(x.requires_grad_())
    y.backward(upstream)
    assert torch.equal(y, expected) and torch.allclose(x.grad, upstream @ layer.dequantize(), atol=1e-6)


def test_its_weight_has_the_look_of_a_weight_and_no_numbers(layer):
    weight = layer.bfloat16().weight
    assert (weight.shape, weight.dtype, weight.device.type, weight.data.shape) == ((7, 50), torch.bfloat16, "cpu", (7, 50))
    for operation in (weight.float, weight.data.clone, lambda: weight.data.add_(1), lambda: setattr(weight, "data", torch.ones(7, 50)), weight.norm):
        with pytest.raises(UnsupportedModel, match=r"no weight to compute with\n.*integer codes"):
            operation()
    with pytest.raises(AttributeError):
        layer.weight = torch.ones(7, 50)


def test_a_layer_without_a_bias_knows_its_dtype_and_device():
    layer = QuantLinear.from_linear(nn.Linear(32, 3, bias=False).half(), W4A8)
    assert layer.weight.dtype == torch.float16 and layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.to("meta").weight.is_meta


def held_layer():
    """A layer whose codes a backend holds, and its codes."""
    scheme = LayerScheme(weight=WeightScheme(num_bits=4, group_size=32), activation=ActivationScheme(num_bits=8))
    layer = QuantLinear.from_linear(nn.Linear(64, 48), scheme)
    codes = layer.qdata.clone()
    layer(torch.randn(3, 64))
    if not layer._buffers["qdata"].is_meta:
        pytest.skip("the CPU kernels can't be compiled here")
    return layer, codes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_layer_whose_codes_are_held_have_their_own(copied):
    layer, codes = held_layer()
    x = torch.randn(3, 64)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x)) and torch.equal(twin.qdata, codes) and torch.equal(layer.state_dict()["qdata"], codes)


def test_what_is_raised_while_preparing_loses_nothing(monkeypatch):
    layer, codes = held_layer()
    layer.unprepare()
    monkeypatch.setattr(QuantLinear, "_input_transform", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer(torch.randn(3, 64))
    assert torch.equal(layer.qdata, codes)


def test_threads_may_call_a_layer_for_the_first_time_at_once():
    scheme = LayerScheme(weight=WeightScheme(num_bits=4, group_size=32), activation=ActivationScheme(num_bits=8))
    x, failures = torch.randn(3, 64), []
    for _ in range(40):
        layer, barrier = QuantLinear.from_linear(nn.Linear(64, 48), scheme), threading.Barrier(4)
        codes = layer.qdata.clone()

        def call(layer=layer, barrier=barrier):
            barrier.wait(timeout=20)
            failures.extend([] if layer(x).isfinite().all() else ["not finite"])

        threads = [threading.Thread(target=call) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join(timeout=20) for thread in threads]
        assert not failures and torch.equal(layer.qdata, codes)


def test_new_smooth_scales_are_used_at_once():
    scheme = LayerScheme.model_validate({"weight": {"num_bits": 8}, "activation": {"num_bits": 8}, "transform": {"kind": "smooth"}})
    layer, x = QuantLinear.from_linear(nn.Linear(64, 48), scheme, smooth=torch.ones(64)), torch.randn(3, 64)
    layer(x)
    layer.smooth = torch.full((64,), 2.0)
    found = layer(x)
    layer.backend = "reference"
    assert (found - layer(x)).norm() < 1e-5 * found.norm()


def test_many_tokens_of_a_weight_only_layer_run_on_an_unpacked_weight():
    layer = QuantLinear.from_linear(nn.Linear(64, 48), LayerScheme(weight=WeightScheme(num_bits=4, group_size=32)))
    few, many = torch.randn(2, 64), torch.randn(500, 64)
    layer(many)
    assert layer._prepared.backend.name == "expanded"
    torch.testing.assert_close(layer(few), layer(torch.cat([few, many]))[:2], rtol=1e-4, atol=1e-5)
