"""What can be known of the kernels without a card: that they compile for each generation, spill nothing, and use the units they are written for.

Launches are recorded instead of run, and compiled with the same arguments, tiles and options, so that these gates can't drift from the operators.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dite_kernels.triton_kernels.backend import missing_package

triton = pytest.importorskip("triton", reason="triton is not installed; pip install 'dite[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 puts the interpreter in the compiler's place", allow_module_level=True)
if (problem := missing_package()) is not None:
    pytest.skip(f"the backend refuses to run: {problem}", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from dite_kernels import affine, codec, packing  # noqa: E402
from dite_kernels.quant_tensor import LinearSpec, QuantTensor  # noqa: E402
from dite_kernels.triton_kernels import product, residual  # noqa: E402
from dite_kernels.triton_kernels.modulate import modulate  # noqa: E402
from dite_kernels.triton_kernels.quantize import CodeFormat, quantize  # noqa: E402
from dite_kernels.triton_kernels.rotation import Transform  # noqa: E402
from dite_kernels.triton_kernels.weight import prepare  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # that one program can have
CAPABILITIES = [90] + [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 89, 100)]  # all four take over 40 s


@dataclass(frozen=True)
class Launched:
    """One kernel with the arguments of one launch."""

    kernel: JITFunction
    arguments: dict

    def compile(self, capability: int) -> CompiledKernel:
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            specialized = isinstance(value, int) and not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[parameter.name], aligned = POINTERS[value.dtype], True
            elif value is None or parameter.is_constexpr or (specialized and value == 1):
                signature[parameter.name], constants[(index,)], aligned = "constexpr", value, False
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                aligned = specialized and value % 16 == 0
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        options = {name: value for name, value in self.arguments.items() if name in OPTIONS}
        return triton.compile(ASTSource(self.kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """A list that fills with launches, none of which runs; nothing is taken from the cache of an earlier run."""
    found: list[Launched] = []

    def record(self, *args, grid, warmup, **kwargs):
        found.append(Launched(self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return found


def multiply(tokens, columns, rows, weight_bits, group_size, symmetric=False, per_group=False):
    spec = LinearSpec(columns, rows, weight_bits, group_size, symmetric, 8, per_group)
    zeros = None if symmetric else torch.zeros(rows, packing.packed_columns(spec.groups, weight_bits), dtype=torch.uint8)
    packed = torch.zeros(rows, packing.packed_columns(columns, weight_bits), dtype=torch.uint8)
    weight = prepare(QuantTensor(packed, torch.ones(rows, spec.groups, dtype=torch.float16), zeros), spec)
    groups = spec.groups if per_group else 1
    x = affine.Quantized(torch.zeros(tokens, columns, dtype=torch.int8), torch.ones(tokens, groups), torch.zeros(tokens, groups, dtype=torch.uint8))
    product.linear(x, weight, torch.zeros(rows, dtype=torch.bfloat16), spec, torch.bfloat16)


def half(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


def rotate(columns, group_size, block):
    quantize(half(512, columns), CodeFormat(8, group_size), Transform(torch.ones(columns), torch.ones(columns), block))


def encode(kind):
    residual.encode_(half(512, 1152), half(512, 1152), kind)


def decode(kind):
    shapes = codec.payload_shapes((512, 1152), kind)
    residual.decode_add_(half(512, 1152), codec.Payload(torch.zeros(shapes[0], dtype=torch.uint8), torch.zeros(shapes[1], dtype=torch.float16)), kind)


PRODUCTS = {
    "W4A8 in groups of 128": (4096, 1152, 1152, 4, 128),
    "W4A8 in groups of 64": (4096, 1152, 1152, 4, 64),
    "W4A8 by rows": (4096, 1152, 4608, 4, None),
    "W4A8, 16 tokens": (16, 1152, 1152, 4, 128),
    "W4A8 per token and group": (256, 3072, 3072, 4, 256, False, True),
    "W8A8 in groups of 128": (4096, 1152, 1152, 8, 128),
    "W8A8 symmetric by rows": (4096, 1152, 1152, 8, None, True),
    "W8A8 per token and group": (4096, 1152, 1152, 8, 128, True, True),
    "W4A8 in groups of 512 per token and group": (4096, 3072, 3072, 4, 512, False, True),
    "W8A8 in groups of 32": (4096, 1152, 1152, 8, 32),
    "W8A8 in groups of 256": (4096, 3072, 3072, 8, 256),
    "W8A8 ragged rows, 33 tokens": (33, 1160, 1152, 8, None),
    "W6A8 ragged": (4096, 1160, 1152, 6, 48),
}
OTHERS = {
    "quantize tokens": lambda: quantize(half(4096, 1152), CodeFormat(8, shifted=True)),
    "quantize groups of 64": lambda: quantize(half(4096, 1152), CodeFormat(8, 64)),
    "quantize fp32 in groups of 48": lambda: quantize(torch.zeros(512, 1160), CodeFormat(4, 48, True)),
    "rotate and quantize tokens": lambda: rotate(1152, None, 128),
    "rotate and quantize groups": lambda: rotate(1152, 128, 128),
    "rotate and quantize ragged tokens": lambda: rotate(1160, None, 64),
    "modulate tokens": lambda: modulate(half(2, 256, 1152), half(2, 1152), half(2, 1152), CodeFormat(8)),
    "modulate long tokens": lambda: modulate(half(1, 2, 8192), half(1, 8192), half(1, 8192), CodeFormat(8, 64)),
    "modulate groups": lambda: modulate(half(2, 256, 3072), half(2, 3072), half(2, 3072), CodeFormat(8, 128)),
}
CODECS = {f"{call.__name__} {kind}": (call, kind) for kind in codec.BITS for call in (encode, decode)}


def stack_bytes(compiled: CompiledKernel, folder: Path) -> int:
    """Of a thread; more than 0 means that registers were spilled."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, timeout=60, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", done.stdout + done.stderr))


def gate(launches, capability, folder) -> list[CompiledKernel]:
    """Each launch compiled; fails where one spills, or needs more shared memory than a card of that generation has."""
    compiled = [launched.compile(capability) for launched in launches]
    assert [stack_bytes(kernel, folder) for kernel in compiled] == [0] * len(launches)
    assert all(kernel.metadata.shared <= SHARED_BYTES[capability] for kernel in compiled)
    return compiled


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_the_integer_matrix_unit_and_loads_that_run_ahead(launches, tmp_path, capability, name):
    multiply(*PRODUCTS[name])
    assembly = gate(launches, capability, tmp_path)[-1].asm
    unit = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
    unit += r"|tcgen05\.mma\S*\.kind::i8" if capability == 100 else ""  # since triton 3.9
    assert re.search(unit, assembly["ptx"]) and "cp.async" in assembly["ptx"]
    if "ragged" not in name:
        assert "local_alloc %" not in assembly["ttgir"], "an operand goes from shared memory through registers back to shared memory"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", OTHERS)
def test_quantizers_compile_without_spills_and_keep_small_numbers(launches, tmp_path, capability, name):
    OTHERS[name]()
    (kernel,) = gate(launches, capability, tmp_path)
    ptx = kernel.asm["ptx"]
    assert "div.rn.f32" in ptx and ".ftz" not in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CODECS)
def test_codecs_compile_without_spills_and_fuse_no_product_with_a_sum(launches, tmp_path, capability, name):
    call, kind = CODECS[name]
    call(kind)
    (kernel,) = gate(launches, capability, tmp_path)
    ptx = kernel.asm["ptx"]
    assert "fma." not in ptx and ".ftz" not in ptx
