"""The residual codec's kernels: the reference codec's payloads and references, bit for bit."""

import pytest
import torch

from dite_kernels import codec
from dite_kernels.bench import codec as bench
from dite_kernels.triton_kernels import residual

SHAPES = [(3, 200), (1, 1), (2, 5, 64), (7, 63), (40, 130)]


def pair(shape, dtype=torch.float32):
    """(x, ref) that differ a little, and nowhere in the first row."""
    ref = torch.randn(shape)
    x = ref + torch.randn(shape) * 0.1
    x.view(-1, shape[-1])[0] = ref.view(-1, shape[-1])[0]
    return x.to(dtype), ref.to(dtype)


def expected(x, ref, kind):
    payload, after = codec.encode(x, ref, kind), ref.clone()
    codec.decode_add_(after, payload, kind)
    return payload, after


@pytest.mark.parametrize("kind", codec.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_payloads_and_references_are_the_reference_s(device, same, rounds_bf16, kind, dtype):
    for shape in SHAPES:
        x, ref = pair(shape, dtype)
        payload, after = expected(x, ref, kind)
        sender, receiver = ref.to(device), ref.clone().to(device)
        found = residual.encode_(x.to(device), sender, kind)
        residual.decode_add_(receiver, codec.Payload(*(part.to(device) for part in payload)), kind)
        assert same(found, payload) and torch.equal(sender, receiver)
        if dtype != torch.bfloat16 or rounds_bf16:
            assert same([sender], [after])
        else:
            assert ((sender.float() - after.float()).abs() <= 2**-7 * after.float().abs()).all()


@pytest.mark.parametrize("kind", codec.BITS)
def test_values_that_are_not_finite_poison_their_own_group_as_in_the_reference(device, same, kind):
    x, ref = pair((6, 130))
    x[1, 70], x[2, 0], x[3, 129], x[4] = float("nan"), float("inf"), float("-inf"), 3e38
    x[5] = ref[5] + 1e-9
    payload, after = expected(x, ref, kind)
    found, sender = None, ref.to(device)
    found = residual.encode_(x.to(device), sender, kind)
    assert same(found, payload) and same([sender], [after])
    assert sender[1, 64:128].isnan().all() and sender[1, :64].isfinite().all() and sender[0].isfinite().all()


def test_a_payload_may_be_views_of_the_buffer_that_is_sent(device, same):
    x, ref = pair((4, 256))
    (codes, scale), after = expected(x, ref, "int4")
    buffer = torch.zeros(codes.numel() + 2 * scale.numel(), dtype=torch.uint8, device=device)
    views = codec.Payload(buffer[: codes.numel()].view(codes.shape), buffer[codes.numel() :].view(torch.float16).view(scale.shape))
    sender = ref.to(device)
    residual.encode_(x.to(device), sender, "int4", views)
    assert same(views, (codes, scale)) and same([sender], [after]) and buffer.any()


def test_a_payload_of_another_shape_is_refused(device):
    x, ref = (part.to(device) for part in pair((4, 256)))
    payload = residual.encode_(x, ref, "int8")
    with pytest.raises(ValueError, match="needs"):
        residual.decode_add_(ref, payload, "int4")


def test_a_reference_that_is_not_contiguous_is_refused(device):
    x = torch.randn(64, 8, device=device).t()
    with pytest.raises(ValueError, match="contiguous"):
        residual.encode_(x, x, "int8")


def test_nothing_to_send_gives_an_empty_payload(device):
    empty = torch.zeros(0, 64, device=device)
    assert residual.encode_(empty, empty.clone(), "int4").codes.shape == (0, 32)


def test_torch_knows_what_the_operators_change(device):
    x, ref = (part.to(device) for part in pair((3, 100)))
    payload = residual.encode_(x, ref.clone(), "int4")
    for operator, arguments in ((residual.encode_residual, (x, ref, *payload, 4)), (residual.decode_residual, (ref, *payload, 4))):
        checks = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


def test_the_bench_has_a_time_for_each_kernel(device):
    signals, notes = [part.float() for part in bench.random_signals(2 * bench.WIDTH, torch.device(device))], []
    found = [candidate.facts for kind in codec.BITS for candidate in bench.candidates(kind, signals, {"triton": residual}, notes)]
    assert [(facts["codec"], facts["direction"]) for facts in found] == [(kind, way) for kind in codec.BITS for way in ("encode", "decode")], notes
