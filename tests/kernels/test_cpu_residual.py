"""The residual codecs in C against the exact ones, byte for byte, at every level that this processor has; and the front that chooses between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dite_kernels import codec, residual
from dite_kernels.codec import Payload, Prediction
from dite_kernels.cpu import build

KINDS = list(codec.BITS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 6e-8, 1.0, -1.5, 127.0, 65504.0, 3e38, -3e38]
NOT_FINITE = [float("nan"), -float("nan"), float("inf"), -float("inf")]


def present() -> list[str]:
    try:
        return build.levels()
    except build.Unavailable:
        return []


@pytest.fixture(scope="module", params=list(build.LEVELS))
def level(request):
    """The library, compiled for one level."""
    if request.param not in present():
        pytest.skip(f"this processor has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITE_CPU_ISA", request.param)
        patch.delenv("DITE_BACKEND", raising=False)
        build.attempt.cache_clear()
        assert residual.implementation() == f"cpu {request.param}"
        yield request.param
    build.attempt.cache_clear()


@pytest.fixture
def threads():
    """Sets torch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bytes_of(tensor):
    """A copy, at an address and with strides that any dtype may have."""
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same(found, expected):
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(bytes_of(found), bytes_of(expected))


def random_numbers(shape, dtype, seed, size=1.0, special=()):
    """Normal numbers, a tenth of them replaced by special ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * size
    if special:
        where = torch.rand(shape, generator=generator) < 0.1
        x = torch.where(where, torch.tensor(special)[torch.randint(len(special), shape, generator=generator)], x)
    return x.to(dtype)


def inside(tensor, before, after):
    """A view equal to `tensor`, within something larger on every side, and that: its last dimension has stride 1."""
    whole = torch.full([size + before + after for size in tensor.shape], 7.0).to(tensor.dtype)
    view = whole[tuple(slice(before, before + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view, whole


def packet_for(shape, kind, offset):
    """Codes, then scales as bytes, in one packet at `offset`."""
    codes, scale = (torch.Size(part).numel() for part in codec.payload_shapes(shape, kind))
    packet = torch.full((offset + codes + 2 * scale + 1,), 0xAA, dtype=torch.uint8)
    return Payload(packet[offset : offset + codes], packet[offset + codes : offset + codes + 2 * scale]), packet


@st.composite
def cases(draw):
    leading = draw(st.lists(st.integers(0, 4), max_size=2))
    shape = (*leading, draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 200])))
    x_dtype, ref_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    special = draw(st.sampled_from([(), SPECIAL, SPECIAL + NOT_FINITE]))
    sizes = st.sampled_from([0.0, 1e-40, 1e-7, 1e-3, 1.0, 100.0, 1e6, 1e30])
    seed, size = draw(st.integers(0, 2**20)), draw(sizes)
    x, ref = random_numbers(shape, x_dtype, seed, size, special), random_numbers(shape, ref_dtype, seed + 1, draw(sizes), special)
    prediction = None
    if draw(st.booleans()):
        beta = random_numbers((shape[0] if len(shape) > 1 else 1,), torch.float32, seed + 2, 0.5, draw(st.sampled_from([(), [0.0, 1.0], NOT_FINITE])))
        prediction = Prediction(beta, random_numbers(shape, ref_dtype, seed + 3, draw(sizes), special))
    return x, ref, prediction


@settings(max_examples=150, deadline=None)
@given(case=cases(), kind=st.sampled_from(KINDS), before=st.integers(0, 3), after=st.integers(0, 70), offset=st.integers(0, 3))
def test_every_shape_stride_dtype_value_and_offset_gives_the_exact_codec_s_bytes(level, case, kind, before, after, offset):
    x, ref, prediction = case
    expected = codec.encode(x, ref, kind, prediction)
    (x_view, _), (ref_view, around_ref) = inside(x, before, after), inside(ref, after % 5, before)
    delta_view, around_delta = inside(prediction.delta if prediction else ref, 0, before)
    viewed = Prediction(prediction.beta, delta_view) if prediction else None
    out, packet = packet_for(x.shape, kind, offset)
    assert residual.encode(x_view, ref_view, kind, viewed, out) is out
    assert same(packet[offset:-1], torch.cat([bytes_of(part) for part in expected])) and packet[:offset].eq(0xAA).all() and packet[-1] == 0xAA
    assert same(x_view, x) and same(ref_view, ref)

    around = [inside(torch.zeros_like(ref), *sides)[1] for sides in ((after % 5, before), (0, before))]
    residual.decode_add_(ref_view, out, kind, viewed)
    codec.decode_add_(ref, expected, kind, prediction)
    assert same(ref_view, ref) and same(delta_view, prediction.delta if prediction else delta_view)
    for whole, view, untouched, start in ((around_ref, ref_view, around[0], after % 5), (around_delta, delta_view, around[1], 0)):
        untouched[tuple(slice(start, start + size) for size in view.shape)] = view
        assert same(whole, untouched)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", [False, True])
def test_any_number_of_threads_gives_the_same_bytes(level, threads, kind, second):
    x, ref, delta = (random_numbers((3, 97, 200), torch.float32, seed) for seed in range(3))
    prediction = Prediction(torch.tensor([0.0, 0.5, 1.0]), delta) if second else None
    expected = codec.encode(x, ref, kind, prediction)
    after = ref.clone(), delta.clone()
    codec.decode_add_(after[0], expected, kind, prediction and Prediction(prediction.beta, after[1]))
    for count in (1, 2, 3):
        threads(count)
        moved = ref.clone(), delta.clone()
        found = residual.encode(x, ref, kind, prediction)
        residual.decode_add_(moved[0], found, kind, prediction and Prediction(prediction.beta, moved[1]))
        pairs = ((found.codes, expected.codes), (found.scale, expected.scale), (moved[0], after[0]), (moved[1], after[1] if second else delta))
        assert all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_every_scale_is_decoded_like_the_exact_codec_does(level, kind, dtype):
    scale = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)[::37].clone()[:, None]
    codes = torch.randint(0, 256, codec.payload_shapes((len(scale), 64), kind)[0], dtype=torch.uint8)
    found, expected = (random_numbers((len(scale), 64), dtype, 0) for _ in range(2))
    residual.decode_add_(found, Payload(codes, scale), kind)
    codec.decode_add_(expected, Payload(codes, scale), kind)
    assert same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_between_two_halves_and_values_between_two_codes_are_rounded_alike(level, kind):
    x = torch.arange(64.0)[None] * torch.linspace(0.5, 4, 4000)[:, None] * torch.tensor([1.0, -1.0]).repeat(32)
    x[:, ::3] = x[:, ::3].round() + 0.5
    found, expected = (encode(x, torch.zeros_like(x), kind) for encode in (residual.encode, codec.encode))
    assert same(found.codes, expected.codes) and same(found.scale, expected.scale)


def test_what_is_not_finite_is_written_as_one_nan(level):
    for dtype in DTYPES:
        ref = torch.tensor([[*NOT_FINITE, 1.0, 2.0] * 30]).to(dtype)
        residual.decode_add_(ref, residual.encode(torch.zeros_like(ref), ref, "int4"), "int4")
        assert len(set(ref.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten().tolist())) == 1


def test_a_rank_s_tokens_of_a_gathered_reference_are_changed_where_they_are(level):
    whole = torch.zeros(2, 10, 70)
    x = torch.ones(2, 4, 70)
    residual.decode_add_(whole[:, 3:7], residual.encode(x, whole[:, 3:7], "int8"), "int8")
    assert torch.allclose(whole[:, 3:7], x, rtol=1e-2) and not whole[:, :3].any() and not whole[:, 7:].any()


def test_the_exact_codec_can_be_forced(monkeypatch):
    monkeypatch.setenv("DITE_BACKEND", "reference")
    monkeypatch.setattr(build, "attempt", None)  # never asked
    assert residual.implementation() == "reference"
    x, ref = torch.randn(3, 70), torch.randn(3, 70)
    assert same(residual.encode(x, ref, "int2").codes, codec.encode(x, ref, "int2").codes)


def test_without_a_compiler_the_reference_serves_and_is_named(monkeypatch):
    monkeypatch.setattr(build, "attempt", lambda: "no C compiler")
    assert residual.implementation() == "reference"
    ref, expected = torch.zeros(3, 70), torch.zeros(3, 70)
    out, packet = packet_for(ref.shape, "int4", 1)
    residual.decode_add_(ref, residual.encode(torch.ones(3, 70), ref, "int4", out=out), "int4")
    codec.decode_add_(expected, codec.encode(torch.ones(3, 70), expected, "int4"), "int4")
    assert torch.equal(ref, expected) and packet[0] == 0xAA


@pytest.mark.parametrize("x", [torch.randn(4, 70, dtype=torch.float64), torch.randn(70, 4).T, torch.randn(2, 1, 2, 70)])
def test_tensors_that_the_kernels_do_not_read_are_left_to_the_reference(x):
    ref = torch.randn_like(x)
    found, expected = residual.encode(x, ref, "int8"), codec.encode(x, ref, "int8")
    after = ref.clone()
    residual.decode_add_(ref, found, "int8")
    codec.decode_add_(after, expected, "int8")
    assert same(found.codes, expected.codes) and same(ref, after)


def wrong_codes(shape):
    return Payload(torch.zeros(3, dtype=torch.uint8), torch.zeros(shape[0], 2, dtype=torch.float16))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: residual.encode(x, x[:, 1:], "int4"), "they must agree"),
        (lambda x: residual.encode(x, x, "int3"), "no codec named int3"),
        (lambda x: residual.encode(x, x, "int4", out=wrong_codes(x.shape)), "bytes"),
        (lambda x: residual.decode_add_(x, wrong_codes(x.shape), "int4"), "bytes"),
        (lambda x: residual.encode(x, x, "int4", Prediction(torch.ones(2), x)), r"needs torch.float32 \(3,\)"),
        (lambda x: residual.encode(x, x, "int4", Prediction(torch.ones(3), x.half())), "delta is torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, backend, call, why):
    monkeypatch.setenv("DITE_BACKEND", backend)
    with pytest.raises(ValueError, match=why):
        call(torch.zeros(3, 70))


def test_a_reference_that_lies_upon_itself_is_refused():
    if not present():
        pytest.skip("no kernels here")
    ref = torch.zeros(1, 70).expand(3, 70)
    with pytest.raises(ValueError, match="clone it"):
        residual.decode_add_(ref, codec.encode(torch.ones(3, 70), ref, "int8"), "int8")
