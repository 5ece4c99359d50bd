"""What torch's own libraries do on the same shape: the baseline that ratios are of, and the ceilings that no kernel of ours is expected to pass.

baseline   the bf16 linear: cuBLAS; on a CPU oneDNN with its weight packed beforehand, about twice as fast as `F.linear` on a plain weight
ceilings   the bare int8 product, activations already quantized and sums left in int32; on CUDA also the fp8 product
machine    how fast the machine copies and multiplies, whatever the shape
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dite_kernels.bench.timing import Clock

MACHINE_RUNS = 5
FP8_MAX = 448.0


@dataclass(frozen=True)
class Inputs:
    """bf16 x [M, K], weight [N, K] and bias [N] of one shape."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def sizes(self) -> list[int]:
        """[M, K, N]."""
        return [*self.x.shape, len(self.weight)]

    @property
    def edge_bytes(self) -> int:
        """What every linear reads and writes besides its weight."""
        return 2 * (self.x.numel() + len(self.x) * len(self.weight) + len(self.bias))


@dataclass(frozen=True)
class Candidate:
    """Something to time: the keys that its row begins with, the call, and the fewest bytes that it can read and write."""

    facts: dict[str, Any]
    call: Callable[[], torch.Tensor]
    bytes: int


def facts(op: str, backend: str, sizes: list[int], bits: tuple[int, int | None]) -> dict[str, Any]:
    """A row's first keys for something without groups; `bits` are the weight's and the activations'."""
    keys = {"op": op, "backend": backend, "weight_bits": bits[0], "activation_bits": bits[1]}
    return keys | {"group_size": None, "weight_symmetric": None, "activation_granularity": None, "shape": sizes}


def baseline(inputs: Inputs) -> Candidate:
    """The bf16 linear, bias included, as fast as torch has it here."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    size = inputs.edge_bytes + 2 * weight.numel()
    if not x.is_cuda and _packs_bf16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        call = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: E731
        return Candidate(facts("linear", "onednn-bf16-prepacked", inputs.sizes, (16, None)), call, size)
    name = "cublas-bf16" if x.is_cuda else "torch-bf16"
    return Candidate(facts("linear", name, inputs.sizes, (16, None)), lambda: F.linear(x, weight, bias), size)


def ceilings(inputs: Inputs) -> Iterator[Candidate]:
    """Products on operands that are narrow already. One may fail when called, on a shape or a card that torch doesn't do it for."""
    m, k, n = inputs.sizes
    x, weight = (_codes(part) for part in (inputs.x, inputs.weight))
    right = weight.t() if x.is_cuda else weight.t().contiguous()  # how each of torch's kernels likes it
    yield Candidate(facts("ceiling", "torch._int_mm", inputs.sizes, (8, 8)), lambda: torch._int_mm(x, right), m * k + k * n + 4 * m * n)
    if inputs.x.is_cuda:
        left, column_major, one = _fp8(inputs.x), _fp8(inputs.weight).t(), torch.ones((), device=inputs.x.device)
        call = lambda: torch._scaled_mm(left, column_major, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
        yield Candidate(facts("ceiling", "torch._scaled_mm fp8", inputs.sizes, (8, 8)), call, m * k + k * n + 2 * m * n)


def machine(device: torch.device, clock: Clock) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) in GB/s, and the rate of a square bf16 product in TFLOP/s; the best of a few runs."""
    elements, width = (2**28, 8192) if device.type == "cuda" else (2**25, 1024)
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.ones(width, width, dtype=torch.bfloat16, device=device)
    copying = _best(lambda: target.copy_(source), clock)
    multiplying = _best(lambda: square @ square, clock)
    return {"copy_gb_per_s": 2 * elements / copying / 1e9, "matmul_bf16_tflop_per_s": 2 * width**3 / multiplying / 1e12}


def _best(call: Callable[[], torch.Tensor], clock: Clock) -> float:
    call()
    return min(clock(call) for _ in range(MACHINE_RUNS))


def _packs_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _codes(x: torch.Tensor) -> torch.Tensor:
    return (x.float() * (127 / x.float().abs().amax())).round().to(torch.int8)


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return (x.float() * (FP8_MAX / x.float().abs().amax())).to(torch.float8_e4m3fn)
