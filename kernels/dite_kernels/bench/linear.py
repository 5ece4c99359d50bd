"""Quantized linears of every backend against the bf16 linear of torch's libraries.

All that a user pays is timed: activations come in bf16, are quantized on the way, and y goes out in bf16 with the bias added; weights are prepared
beforehand. A candidate whose first rows are not the exact reference's has no time here: it has a note, and so has a backend that can't run a scheme.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dite_kernels import backends, reference
from dite_kernels.bench.cases import DEFAULT_SCHEMES, DEFAULT_SHAPES, Scheme, Shape, UnknownCase, names
from dite_kernels.bench.document import aligned, reason
from dite_kernels.bench.environment import chosen_device, environment
from dite_kernels.bench.timing import Budget, Clock, Progress, Timing, interleave, kernel_clock
from dite_kernels.bench.vendor import Candidate, Inputs, baseline, ceilings, facts, machine
from dite_kernels.quant_tensor import LinearSpec, QuantTensor, quantize_weight

NAME = "linear"
HELP = "quantized linears of every backend against bf16"
ORACLE = "reference"  # exact and slow: measured only when it is asked for
CHECKED_ROWS = 16
WORST_ERROR = 0.02  # ‖y − reference‖ ÷ ‖reference‖; one rounding of everything to bf16 leaves about 0.004
WARM_UP_CALLS = 2
HEADINGS = ("shape", "op", "backend", "scheme", "p20 µs", "p50 µs", "p80 µs", "ratio", "TFLOP/s", "GB/s")


@dataclass(frozen=True)
class Options:
    """What to measure. `backends` empty: all that there are, but for the oracle."""

    shapes: list[Shape]
    schemes: list[Scheme]
    backends: list[str]
    budget: Budget = field(default_factory=Budget)
    device: str = "cpu"

    @classmethod
    def parse(cls, shapes: str, schemes: str, backends: str = "", budget: Budget | None = None, device: str = "cpu") -> "Options":
        """From comma-separated text. Raises UnknownCase."""
        found = cls([*map(Shape.parse, names(shapes))], [*map(Scheme.parse, names(schemes))], names(backends), budget or Budget(), device)
        if not found.shapes or not found.schemes:
            raise UnknownCase("nothing to measure; give at least one shape and one scheme")
        return found


def bench_linear(options: Options, clock: Clock | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, and return the document: environment, machine, rows, and notes on what could not be measured. Raises UnknownCase."""
    wanted, device = _backends(options.backends), chosen_device(options.device)
    clock = clock or kernel_clock(device)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with torch.inference_mode():
        limits = machine(device, clock)
        for done, shape in enumerate(options.shapes):
            rows += _measure(shape, wanted, options, clock, notes)
            if progress:
                progress("shapes", done + 1, len(options.shapes))
    return {"environment": environment(), "machine": limits, "rows": rows, "notes": list(dict.fromkeys(notes))}


def table(document: dict[str, Any]) -> str:
    """All rows in aligned columns, then the notes."""
    baselines = sorted({row["baseline"] for row in document["rows"]})
    return aligned([HEADINGS, *map(_cells, document["rows"])], 4, f"ratio: to {', '.join(baselines)}; above 1 is faster", document["notes"])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, metavar="MxKxN,...", help=f"by default {DEFAULT_SHAPES}")
    parser.add_argument("--schemes", default=DEFAULT_SCHEMES, metavar="NAME,...", help=f"by default {DEFAULT_SCHEMES}")
    parser.add_argument("--backends", default="", metavar="NAME,...", help=f"by default all but {ORACLE}: {', '.join(backends.BACKENDS)}")


def run(arguments: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    budget = Budget(arguments.rounds, arguments.seconds)
    return bench_linear(Options.parse(arguments.shapes, arguments.schemes, arguments.backends, budget, arguments.device), progress=progress)


def _measure(shape: Shape, wanted: list[str], options: Options, clock: Clock, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of one shape: all its candidates share their rounds."""
    inputs = random_inputs(shape, torch.device(options.device))
    first = baseline(inputs)
    candidates = {"baseline": first}
    for candidate in ceilings(inputs):
        if _warm(candidate, f"{candidate.facts['backend']} at {shape}", notes) is not None:
            candidates[candidate.facts["backend"]] = candidate
    for scheme in options.schemes:
        for name, candidate in quantized(inputs, scheme, wanted, notes):
            candidates[f"{name} {scheme}"] = candidate
    for _ in range(WARM_UP_CALLS):
        first.call()
    timings = interleave({key: candidate.call for key, candidate in candidates.items()}, "baseline", options.budget, clock)
    return [_row(candidate, timings[key], first.facts["backend"]) for key, candidate in candidates.items()]


def quantized(inputs: Inputs, scheme: Scheme, wanted: list[str], notes: list[str]) -> Iterator[tuple[str, Candidate]]:
    """The backends of `wanted` that can run a scheme, warm and found right, by name; a note on each that can't."""
    m, k, n = inputs.sizes
    bits = (scheme.weight_bits, scheme.activation_bits)
    activations = {"activation_bits": scheme.activation_bits, "activation_per_group": scheme.activation_per_group}
    spec = LinearSpec(k, n, scheme.weight_bits, scheme.group_size, scheme.weight_symmetric, **activations)
    weight = quantize_weight(inputs.weight, spec)
    size = inputs.edge_bytes + sum(part.numel() * part.element_size() for part in (weight.qdata, weight.scale, weight.zero_point) if part is not None)
    groups = {"group_size": scheme.group_size, "weight_symmetric": scheme.weight_symmetric, "activation_granularity": scheme.granularity}
    picked, expected = _oracle(inputs, weight, spec)
    for name in wanted:
        what = f"{name} {scheme} at {m}x{k}x{n}"
        try:
            backend = backends.select(spec, inputs.x.device, name)
            if backend.name != name:
                raise backends.BackendUnavailable(f"runs as {backend.name}")
            call = partial(backend.linear, inputs.x, backend.prepare(weight, spec, inputs.x.dtype), inputs.bias, spec)
        except Exception as error:  # a compiler, a driver, an allocator: the other backends can still be measured
            notes.append(f"{what}: {reason(error)}")
            continue
        candidate = Candidate(facts("linear", name, inputs.sizes, bits) | groups, call, size)
        y = _warm(candidate, what, notes)
        if y is None:
            continue
        error = float((y[picked].float() - expected).norm() / expected.norm())
        if not error <= WORST_ERROR:
            notes.append(f"{what}: wrong, {error:.2g} from the reference where {WORST_ERROR} is allowed")
            continue
        candidate.facts["error_to_reference"] = error
        yield name, candidate


def random_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Normal noise, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((shape.m, shape.k), (shape.n, shape.k), (shape.n,)))
    return Inputs(*(part.to(device, torch.bfloat16) for part in (x, weight / shape.k**0.5, bias)))


def _oracle(inputs: Inputs, weight: QuantTensor, spec: LinearSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A few row numbers from all over x, and what the reference makes of these rows, in fp32."""
    picked = torch.linspace(0, len(inputs.x) - 1, min(CHECKED_ROWS, len(inputs.x)), device="cpu").long().to(inputs.x.device)
    return picked, reference.linear(inputs.x[picked].float(), weight, inputs.bias, spec)


def _warm(candidate: Candidate, what: str, notes: list[str]) -> torch.Tensor | None:
    """What the candidate returns once it is warm; None, and a note, if it fails."""
    try:
        for _ in range(WARM_UP_CALLS):
            y = candidate.call()
        return y
    except Exception as error:  # as above; on CUDA torch refuses some shapes only when called
        notes.append(f"{what}: {reason(error)}")
        return None


def _row(candidate: Candidate, timing: Timing, against: str) -> dict[str, Any]:
    m, k, n = candidate.facts["shape"]
    seconds = timing.p50_us / 1e6
    rates = {"tflop_per_s": 2 * m * k * n / seconds / 1e12, "gb_per_s": candidate.bytes / seconds / 1e9}
    return candidate.facts | {"us": timing.us, "baseline": against, "ratio_to_baseline": timing.ratio} | rates


def _backends(wanted: list[str]) -> list[str]:
    unknown = next((name for name in wanted if name not in backends.BACKENDS), None)
    if unknown is not None:
        raise UnknownCase(f"no backend {unknown!r}; there are {', '.join(backends.BACKENDS)}")
    return wanted or [name for name in backends.BACKENDS if name != ORACLE]


def _cells(row: dict[str, Any]) -> list[str]:
    """One row as people read it, under HEADINGS."""
    times = [f"{row['us'][name]:.1f}" for name in ("p20", "p50", "p80")]
    rates = [f"{row[name]:.2f}" if name in row else "" for name in ("tflop_per_s", "gb_per_s")]
    return ["×".join(map(str, row["shape"])), row["op"], row["backend"], _scheme(row), *times, f"{row['ratio_to_baseline']:.2f}", *rates]


def _scheme(row: dict[str, Any]) -> str:
    """Bits and granularity of a row in one word.

    >>> _scheme({"weight_bits": 4, "activation_bits": 8, "group_size": 64, "weight_symmetric": False, "activation_granularity": "group"})
    'w4a8 g64, per group'
    """
    bits = "bf16" if row["weight_bits"] == 16 else f"w{row['weight_bits']}a{row['activation_bits'] or 16}{' sym' if row['weight_symmetric'] else ''}"
    group = f" g{row['group_size']}" if row["group_size"] else ""
    return f"{bits}{group}, per group" if row["activation_granularity"] == "group" else bits + group
