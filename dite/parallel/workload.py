"""What is computed and over which wire: the two sides that the cost model weighs against each other.

Presets are for predictions about GPUs, and say of each figure whether it was counted, measured or assumed. For a prediction about your own machine,
measure `compute_s`, `attention_share` and `fixed_s`, and the link's two figures.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

from dite.errors import UsageError
from dite.parallel.document import check_int, check_number


@dataclass(frozen=True)
class Workload:
    """One forward of a transformer on one device, as a pipeline calls it (`batch` includes the CFG branches).

    layers: attention layers with token mixing over the image; tokens: that attend to each other, a sample (text tokens of joint attention included);
    width: of K, and of V; value_bytes: of a raw activation on the wire; output_channels: values of the output per output token; compute_s: seconds
    of one forward on one device, `fixed_s` included; attention_share: of compute_s, spent in attention itself; fixed_s: seconds that don't
    shrink when a device has fewer tokens (embeddings, adaLN, launches); output_tokens: those that have an output (None: all); source: of compute_s.
    """

    name: str
    layers: int
    tokens: int
    width: int
    heads: int
    output_channels: int
    compute_s: float
    batch: int = 1
    value_bytes: int = 2
    attention_share: float = 0.0
    fixed_s: float = 0.0
    output_tokens: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("layers", "tokens", "width", "heads", "output_channels", "batch", "value_bytes"):
            check_int(getattr(self, name), 1, 10**9, name)
        check_number(self.compute_s, 0.0, 1e6, "compute_s")
        check_number(self.fixed_s, 0.0, self.compute_s, "fixed_s")
        check_number(self.attention_share, 0.0, 1.0, "attention_share")
        if self.output_tokens is not None:
            check_int(self.output_tokens, 1, self.tokens, "output_tokens")
        if self.width % self.heads:
            raise UsageError(f"a workload of width {self.width} with {self.heads} heads", "the heads must divide the width")

    @property
    def outputs(self) -> int:
        """Tokens that have an output."""
        return self.tokens if self.output_tokens is None else self.output_tokens

    def one_branch(self) -> Self:
        """What one of the two CFG groups computes: half the batch."""
        if self.batch % 2:
            raise UsageError(f"CFG on two groups with a batch of {self.batch}", "the batch must hold both branches of each sample", "use cfg=False")
        return replace(self, batch=self.batch // 2, compute_s=self.fixed_s + (self.compute_s - self.fixed_s) / 2)


@dataclass(frozen=True)
class Link:
    """The wire of each rank: `bandwidth_bytes_per_s` in one direction, `latency_s` of a message; `duplex`: it sends and receives at once."""

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float
    duplex: bool = True

    def __post_init__(self) -> None:
        check_number(self.bandwidth_bytes_per_s, 1.0, 1e15, "bandwidth_bytes_per_s")
        check_number(self.latency_s, 0.0, 1e6, "latency_s")

    def seconds(self, sent_bytes: int, messages: int = 1) -> float:
        """Of `sent_bytes` in as many consecutive messages, while the rank receives as much."""
        return messages * self.latency_s + sent_bytes / self.bandwidth_bytes_per_s * (1 if self.duplex else 2)


def _links(*links: Link) -> MappingProxyType[str, Link]:
    return MappingProxyType({link.name: link for link in links})


# Nominal bandwidth, one direction, for each rank (TCP leaves about 95% of Ethernet); latencies are assumptions: typical of TCP, or of NCCL.
LINKS = _links(
    Link("100mbit", 12.5e6, 200e-6),
    Link("300mbit", 37.5e6, 200e-6),
    Link("1gbit", 125e6, 100e-6),
    Link("10gbe", 1.25e9, 50e-6),
    Link("pcie4", 25e9, 15e-6),  # 16 lanes: 31.5e9 less protocol
    Link("nvlink", 400e9, 10e-6),  # NVLink 4: 450e9 less protocol
)

# FLUX took 28.06 s for 28 steps on one L20 (arXiv 2507.17511, table of latencies): 74 TFLOP a step, so 74 TFLOP/s sustained. The others are *assumed*
# to run at that rate: operations counted as 24·tokens·width² + 4·tokens²·width a layer and sample (PixArt 28 instead of 24: cross-attention).
SUSTAINED_FLOPS = 74e12
_FLUX_S = 28.06 / 28


def _assumed(name: str, tokens: int, flops_per_sample: float, attention_flops: float) -> Workload:
    """The two class- and text-conditioned models of one shape: 28 layers of width 1152, CFG, learned sigma, patches of 2×2."""
    return Workload(
        name=name,
        layers=28,
        tokens=tokens,
        width=1152,
        heads=16,
        batch=2,
        output_channels=32,
        compute_s=2 * flops_per_sample / SUSTAINED_FLOPS + 0.001,
        attention_share=attention_flops / flops_per_sample,
        fixed_s=0.001,
        source=f"assumed: {2 * flops_per_sample / 1e12:.1f} TFLOP counted, at 74 TFLOP/s sustained, and 1 ms fixed",
    )


def _workloads(*workloads: Workload) -> MappingProxyType[str, Workload]:
    return MappingProxyType({workload.name: workload for workload in workloads})


WORKLOADS = _workloads(
    _assumed("dit-xl-2-512", 1024, 28 * (24 * 1024 * 1152**2 + 4 * 1024**2 * 1152), 28 * 4 * 1024**2 * 1152),
    _assumed("pixart-1024", 4096, 28 * (28 * 4096 * 1152**2 + 4 * 4096**2 * 1152), 28 * 4 * 4096**2 * 1152),
    Workload(
        name="flux-1024",
        layers=57,
        tokens=4096 + 512,
        width=3072,
        heads=24,
        output_channels=64,
        output_tokens=4096,
        compute_s=_FLUX_S,
        attention_share=0.20,  # 14.9 of 74 TFLOP
        fixed_s=0.0,
        source="measured by arXiv 2507.17511 on one L20; attention's share counted from operations",
    ),
)
