"""The CPU kernels against the reference, at every level that this processor has, and what happens where they can't be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dite_kernels import backends, packing, reference
from dite_kernels.backend import InputTransform
from dite_kernels.cpu import build
from dite_kernels.hadamard import signs
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight

CPU = torch.device("cpu")
# The integer sums are exact. Then both sides add G fp32 terms and the zero points' share, in different orders: a few units in the last place of the
# largest term, which is up to about 30 times the result.
ULPS = 40 * torch.finfo(torch.float32).eps
SHAPES = [(1, 1, 1), (5, 33, 1), (17, 129, 8), (3, 7, 3), (64, 128, 64), (65, 300, 70), (130, 257, 65), (33, 512, 130)]
GROUPS = [16, 32, 64, 128, 192, None]
ARITHMETIC = [(8, False, False), (8, True, False), (4, True, False), (4, False, False), (8, False, True), (8, True, True), (None, False, False)]


def present() -> list[str]:
    try:
        return build.levels()
    except build.Unavailable:
        return []


@pytest.fixture(params=list(build.LEVELS))
def level(request, monkeypatch):
    """The backend, compiled for one level."""
    if request.param not in present():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("DITE_CPU_ISA", request.param)
    build.attempt.cache_clear()
    try:
        assert build.library().level == request.param
        yield request.param
    finally:
        build.attempt.cache_clear()


def random_weight(spec, seed=0):
    return quantize_weight(torch.randn(spec.out_features, spec.in_features, generator=torch.Generator().manual_seed(seed)), spec)


def run(x, weight, bias, spec, **more):
    backend = backends.BACKENDS["cpu"]
    return backend.linear(x, backend.prepare(weight, spec, x.dtype), bias, spec, **more)


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_shape_group_and_arithmetic_agrees_with_the_reference(level, shape, bits):
    m, k, n = shape
    x, bias = torch.randn(m, k, generator=torch.Generator().manual_seed(k)) * 3, torch.randn(n)
    for group_size in GROUPS:
        for symmetric in (False, True):
            for arithmetic in ARITHMETIC:
                spec = LinearSpec(k, n, bits, group_size, symmetric, *arithmetic)
                weight = random_weight(spec)
                assert difference(run(x, weight, bias, spec), reference.linear(x, weight, bias, spec)) <= ULPS, spec


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_group", [False, True])
def test_integer_sums_are_exact(level, bits, per_group):
    spec = LinearSpec(300, 70, bits, 128, False, 8, per_group)
    codes, zeros = torch.randint(0, 2**bits, (70, 300)), torch.randint(0, 2**bits, (70, 3))
    weight = QuantTensor(packing.pack(codes.to(torch.uint8), bits), torch.ones(70, 3), packing.pack(zeros.to(torch.uint8), bits))
    x = torch.randint(0, 256, (67, 300)).float()
    x[:, [0, 128, 299]], x[:, [1, 129, 298]] = 0.0, 255.0  # in every group: scale 1, so that every code is the number itself
    assert torch.equal(run(x, weight, None, spec), reference.linear(x, weight, None, spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_results_are_those_of_fp32_rounded_once(level, dtype):
    spec = LinearSpec(256, 100, 4, 64, False, 8)
    weight, x, bias = random_weight(spec), torch.randn(70, 256).to(dtype), torch.randn(100).to(dtype)
    exact = reference.linear(x.float(), weight, bias, spec)
    found = run(x, weight, bias, spec)
    assert found.dtype == dtype and difference(found.float(), exact) <= torch.finfo(dtype).eps


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_layers_agree_with_the_reference(data):
    draw = data.draw
    m, k, n = (draw(st.integers(1, most)) for most in (140, 400, 140))
    bits, group = draw(st.sampled_from([4, 6, 8])), draw(st.sampled_from([16, 48, 64, 96, 128, 256, None]))
    spec = LinearSpec(k, n, bits, group, draw(st.booleans()), *draw(st.sampled_from(ARITHMETIC)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(m, k, generator=generator) * 10 ** draw(st.integers(-6, 6))
    weight = random_weight(spec, seed=m)
    expected = reference.linear(x, weight, None, spec)
    assert (run(x, weight, None, spec) - expected).abs().max() <= ULPS * expected.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_group", [False, True])
def test_what_is_not_finite_stays_in_its_token(level, bad, dtype, per_group):
    spec = LinearSpec(200, 40, 8, 64, False, 8, per_group)
    weight, x = random_weight(spec), torch.randn(70, 200).to(dtype)
    clean = run(x, weight, None, spec)
    x[33, 150] = bad
    found = run(x, weight, None, spec)
    assert not found[33].isfinite().any()
    others = torch.arange(70) != 33
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("x", [torch.zeros(3, 64), torch.full((3, 64), 1e-42), torch.full((2, 64), 1e36), torch.randn(0, 64), -torch.ones(1, 64)])
def test_degenerate_inputs_agree_with_the_reference(level, x):
    spec = LinearSpec(64, 20, 4, 32, False, 8)
    weight = random_weight(spec)
    torch.testing.assert_close(run(x, weight, None, spec), reference.linear(x, weight, None, spec), rtol=1e-4, atol=1e-37)


def test_any_number_of_threads_gives_the_same_bits(level):
    spec = LinearSpec(1152, 300, 4, 128, False, 8)
    weight, x, before = random_weight(spec), torch.randn(300, 1152).bfloat16(), torch.get_num_threads()
    try:
        found = [torch.set_num_threads(threads) or run(x, weight, None, spec) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 32, 33])
def test_weight_only_layers_take_any_number_of_tokens(level, tokens):
    for bits in (4, 8):
        spec = LinearSpec(203, 77, bits, 64)
        weight, x, bias = random_weight(spec), torch.randn(tokens, 203), torch.randn(77)
        assert difference(run(x, weight, bias, spec), reference.linear(x, weight, bias, spec)) <= ULPS


@pytest.mark.parametrize("columns", [256, 1152, 100, 203, 3])
@pytest.mark.parametrize("block", [128, 64, 8, None])
def test_smoothing_and_rotation_are_those_of_the_input_transform(level, columns, block):
    spec = LinearSpec(columns, 40, 8, 64, False, 8)
    transform = InputTransform(torch.rand(columns) + 0.5, signs(columns, 0) if block else None, block)
    weight, x = random_weight(spec), torch.randn(20, columns)
    # Another order of additions moves numbers that lie between two codes to the other one.
    assert difference(run(x, weight, None, spec, transform=transform), reference.linear(transform(x), weight, None, spec)) < 5e-3


def test_gelu_is_torchs(level):
    spec = LinearSpec(64, 40, 8, 64, False, 8)
    weight, x = random_weight(spec), torch.cat([torch.randn(50, 64) * 4, torch.zeros(1, 64)])
    found = run(x, weight, None, spec, gelu=True)
    assert difference(found, F.gelu(reference.linear(x, weight, None, spec), approximate="tanh")) <= 2 * ULPS


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_was_packed_comes_back_bit_for_bit(level, bits):
    spec = LinearSpec(203, 77, bits, 64, False, 8)
    weight, backend = random_weight(spec), backends.BACKENDS["cpu"]
    found = backend.restore(backend.prepare(weight, spec, torch.float32), spec)
    assert torch.equal(found.qdata, weight.qdata) and found.scale is weight.scale and found.zero_point is weight.zero_point


def test_packed_four_bit_codes_take_no_more_than_their_share(level):
    spec = LinearSpec(1152, 1152, 4, 128, False, 8)
    packed = backends.BACKENDS["cpu"].prepare(random_weight(spec), spec, torch.bfloat16)
    held = sum(part.numel() * part.element_size() for part in (*packed.parts, packed.scale, packed.zero_point))
    assert held < 0.35 * 2 * 1152 * 1152


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("DITE_CACHE", str(tmp_path))
    build.attempt.cache_clear()
    yield
    build.attempt.cache_clear()


def test_without_a_compiler_the_next_backend_serves_and_says_why(without_compiler):
    spec = LinearSpec(64, 8, 4, 32, False, 8)
    assert backends.select(spec, CPU).name == "expanded"
    row = next(row for row in backends.describe() if row["name"] == "cpu")
    assert not row["ok"] and "no C compiler" in row["reason"]
    with pytest.raises(backends.BackendUnavailable, match="no C compiler"):
        backends.select(spec, CPU, "cpu")


@pytest.mark.parametrize(("level_name", "why"), [("mmx", "is none of amx, avx512_vnni"), ("amx", "this processor lacks")])
def test_a_level_that_is_not_there_is_refused(monkeypatch, level_name, why):
    monkeypatch.setenv("DITE_CPU_ISA", level_name)
    monkeypatch.setattr(build, "processor_flags", set)
    with pytest.raises(build.Unavailable, match=why):
        build.levels()


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'cc: fatal error: out of patience' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("DITE_CACHE", str(tmp_path / "cache"))
    assert "out of patience" in build.attempt.__wrapped__()
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DITE_CACHE", str(tmp_path / "file"))
    assert build.attempt.__wrapped__().level == build.levels()[0]


def test_processes_that_start_at_once_compile_one_library(tmp_path):
    code = (
        "import torch; from dite_kernels import backends; from dite_kernels.quant_tensor import LinearSpec, quantize_weight; torch.manual_seed(0);"
        "spec = LinearSpec(96, 40, 4, 32, False, 8); b = backends.select(spec, torch.device('cpu'), 'cpu');"
        "x = torch.randn(9, 96); w = quantize_weight(torch.randn(40, 96), spec);"
        "print(b.linear(x, b.prepare(w, spec, x.dtype), None, spec).sum().item())"
    )
    kernels = str(Path(build.__file__).parents[2])
    environment = os.environ | {"DITE_CACHE": str(tmp_path), "DITE_CPU_ISA": "portable", "PYTHONPATH": kernels}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=170)[0] for process in started]
    assert all(process.returncode == 0 for process in started) and len(set(answers)) == 1
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation_bits", [8, None])
def test_the_default_dtype_and_device_are_of_no_consequence(dtype, activation_bits):
    spec = LinearSpec(70, 40, 8, 32, False, activation_bits)
    weight, x = random_weight(spec), torch.randn(5, 70)
    expected = run(x, weight, None, spec)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = run(x, weight, None, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_inputs_need_not_lie_in_one_piece():
    spec = LinearSpec(70, 40, 8, 32, False, 8)
    weight, x, bias = random_weight(spec), torch.randn(5, 70), torch.randn(40)
    expected = run(x, weight, bias, spec)
    spread = torch.stack([bias, torch.zeros(40)], 1)[:, 0]
    assert torch.equal(run(x.T.contiguous().T, weight, spread, spec), expected) and torch.equal(
        run(torch._neg_view(-x), weight, bias, spec), expected
    )


def test_tracing_is_refused():
    spec = LinearSpec(70, 40, 8, 32, False, 8)
    with pytest.raises(RuntimeError, match="set_backend"):
        torch.jit.trace(lambda x: run(x, random_weight(spec), None, spec), torch.randn(5, 70))
