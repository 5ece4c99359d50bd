"""Residual codecs of every backend against a plain copy of the activations that they compress.

    encode    x and its reference → a payload, into a buffer that is about to be sent, and the reference updated: what a sender does
    decode    reference ← reference + D(payload): what each receiver does
    copy      torch's copy_ of as many elements, timed in the same rounds

x and references are bf16. `ratio_to_memcpy` is the copy's time ÷ own time, the median over rounds: above 1 is faster than a copy. Bytes are those
that must be read and written, once each: encode reads x and reference and writes reference and payload, decode reads reference and payload and writes
the reference. `share_of_copy_bandwidth` is bytes a second over the copy's. A candidate whose payload and reference are not the exact codec's, bit for
bit, has a note and no time.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Protocol

import torch

from dite_kernels import codec as exact
from dite_kernels.backends import BackendUnavailable
from dite_kernels.bench.cases import DEFAULT_CODECS, MOST_ELEMENTS, UnknownCase, codec_names, names
from dite_kernels.bench.document import aligned, reason
from dite_kernels.bench.environment import chosen_device, environment
from dite_kernels.bench.timing import Budget, Clock, Progress, Timing, interleave, kernel_clock
from dite_kernels.bench.vendor import Candidate
from dite_kernels.codec import Payload
from dite_kernels.cpu import build
from dite_kernels.cpu import residual as cpu
from dite_kernels.triton_kernels.backend import missing

NAME = "codec"
HELP = "residual codecs of every backend against a copy"
WIDTH = 1152  # of DiT-XL/2's tokens
ELEMENTS = {"cpu": 2**10 * WIDTH, "cuda": 2**15 * WIDTH}  # on a card: 75 MB in bf16, more than an L2 holds
CHANGE = 0.1  # of the activations from one step to the next, relative to them
TURNS = 2
HEADINGS = ("codec", "direction", "backend", "elements", "p20 ns/el", "p50 ns/el", "p80 ns/el", "ratio", "bandwidth", "GB/s")


class Codec(Protocol):
    """What is measured: a module or an object with these two. Both change their arguments in place."""

    def encode_(self, x: torch.Tensor, ref: torch.Tensor, kind: str, out: Payload) -> object: ...

    def decode_add_(self, ref: torch.Tensor, payload: Payload, kind: str) -> object: ...


class Reference:
    """The exact codec, in plain torch."""

    def encode_(self, x: torch.Tensor, ref: torch.Tensor, kind: str, out: Payload) -> None:
        for part, found in zip(out, exact.encode(x, ref, kind), strict=True):
            part.copy_(found)
        exact.decode_add_(ref, out, kind)

    def decode_add_(self, ref: torch.Tensor, payload: Payload, kind: str) -> None:
        exact.decode_add_(ref, payload, kind)


class Cpu:
    """C."""

    def encode_(self, x: torch.Tensor, ref: torch.Tensor, kind: str, out: Payload) -> None:
        cpu.encode_into(out, x, ref, kind)
        cpu.decode_add_(ref, out, kind)

    def decode_add_(self, ref: torch.Tensor, payload: Payload, kind: str) -> None:
        cpu.decode_add_(ref, payload, kind)


def _cpu(device: torch.device) -> Codec:
    if device.type != "cpu":
        raise BackendUnavailable(f"it runs on CPUs, not on {device.type}")
    try:
        build.library()
    except build.Unavailable as error:
        raise BackendUnavailable(str(error)) from error
    return Cpu()


def _triton(device: torch.device) -> Codec:
    why = "it needs an NVIDIA card" if device.type == "cpu" else missing(device)  # its interpreter's times would say nothing
    if why:
        raise BackendUnavailable(why)
    from dite_kernels.triton_kernels import residual

    return residual


CODECS: dict[str, Callable[[torch.device], Codec]] = {"reference": lambda device: Reference(), "cpu": _cpu, "triton": _triton}


@dataclass(frozen=True)
class Options:
    """What to measure. `backends` empty: all that there are. `elements`: at least so many, in whole rows of WIDTH."""

    codecs: list[str]
    backends: list[str]
    elements: int
    budget: Budget = field(default_factory=Budget)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def parse(cls, codecs: str, backends: str = "", elements: int | None = None, budget: Budget | None = None, device: str = "cpu") -> "Options":
        """Lists are comma-separated text; `elements` None: ELEMENTS. Raises UnknownCase."""
        chosen, wanted, place = codec_names(codecs), names(backends), chosen_device(device)
        unknown = next((name for name in wanted if name not in CODECS), None)
        if unknown is not None:
            raise UnknownCase(f"no backend {unknown!r}; there are {', '.join(CODECS)}")
        if elements is None:
            elements = ELEMENTS[place.type]
        if not 1 <= elements <= MOST_ELEMENTS:
            raise UnknownCase(f"{elements} elements can't be measured; from 1 to {MOST_ELEMENTS} can")
        return cls(chosen, wanted or list(CODECS), elements, budget or Budget(), place)


@dataclass(frozen=True)
class Work:
    """A codec at work, one turn a call, and the tensors that each turn changes."""

    call: Callable[[], object]
    state: tuple[torch.Tensor, ...]


def encoding(codec: Codec, signals: list[torch.Tensor], kind: str) -> Work:
    """The reference follows one signal, then the other, so that residuals never fade."""
    ref, turns = signals[1].clone(), cycle(signals)
    codes, scale = exact.payload_shapes(ref.shape, kind)
    out = Payload(torch.empty(codes, dtype=torch.uint8, device=ref.device), torch.empty(scale, dtype=torch.float16, device=ref.device))
    return Work(lambda: codec.encode_(next(turns), ref, kind, out), (ref, *out))


def decoding(codec: Codec, signals: list[torch.Tensor], kind: str) -> Work:
    """There and back, so that the reference stays where it is: a payload, then the same with its scale negated."""
    first, second = signals
    there = exact.encode(first, second, kind)
    ref, turns = second.clone(), cycle([there, Payload(there.codes, -there.scale)])
    return Work(lambda: codec.decode_add_(ref, next(turns), kind), (ref,))


DIRECTIONS = {"encode": encoding, "decode": decoding}


def bench_codec(options: Options, clock: Clock | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, and return the document: environment, rows, and notes on what could not be measured."""
    clock = clock or kernel_clock(options.device)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with torch.inference_mode():
        signals = random_signals(options.elements, options.device)
        codecs = dict(_codecs(options, notes))
        for done, kind in enumerate(options.codecs):
            rows += _measure(kind, signals, list(candidates(kind, signals, codecs, notes)), options.budget, clock)
            if progress:
                progress("codecs", done + 1, len(options.codecs))
    return {"environment": environment(), "rows": rows, "notes": notes}


def candidates(kind: str, signals: list[torch.Tensor], codecs: dict[str, Codec], notes: list[str]) -> Iterator[Candidate]:
    """Both directions of each backend, warm and found right; a note on each that isn't."""
    elements = signals[0].numel()
    for direction, start in DIRECTIONS.items():
        for name, codec in codecs.items():
            what = f"{name} {kind} {direction}"
            try:
                work = start(codec, signals, kind)
                right = _is_exact(work, start(Reference(), signals, kind))
            except Exception as error:  # a compiler, a driver, an allocation: the others can still be measured
                notes.append(f"{what}: {reason(error)}")
                continue
            if not right:
                notes.append(f"{what}: wrong, payload and reference must be the exact codec's, bit for bit")
                continue
            facts = {"codec": kind, "direction": direction, "backend": name, "elements": elements}
            yield Candidate(facts, work.call, least_bytes(direction, signals[0], kind))


def least_bytes(direction: str, x: torch.Tensor, kind: str) -> int:
    """What must be read and written of x, its reference and the payload."""
    codes, scale = (torch.Size(shape).numel() for shape in exact.payload_shapes(x.shape, kind))
    return (3 if direction == "encode" else 2) * x.numel() * x.element_size() + codes + 2 * scale


def random_signals(elements: int, device: torch.device) -> list[torch.Tensor]:
    """Activations [rows, WIDTH] of two neighbouring steps, bf16: normal noise, the same on every machine."""
    generator, shape = torch.Generator().manual_seed(0), (-(-elements // WIDTH), WIDTH)
    first = torch.randn(shape, generator=generator, device="cpu")
    second = first + CHANGE * torch.randn(shape, generator=generator, device="cpu")
    return [part.to(device, torch.bfloat16) for part in (first, second)]


def table(document: dict[str, Any]) -> str:
    """All rows in aligned columns, then the notes."""
    return aligned([HEADINGS, *map(_cells, document["rows"])], 3, "ratio: to a copy of as many bf16 elements; above 1 is faster", document["notes"])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codecs", default=DEFAULT_CODECS, metavar="NAME,...", help=f"by default {DEFAULT_CODECS}")
    parser.add_argument("--backends", default="", metavar="NAME,...", help=f"by default all: {', '.join(CODECS)}")
    sizes = ", ".join(f"{size} on {kind}" for kind, size in ELEMENTS.items())
    parser.add_argument("--elements", type=int, metavar="N", help=f"at least so many, in whole rows of {WIDTH}; by default {sizes}")


def run(arguments: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    budget = Budget(arguments.rounds, arguments.seconds)
    return bench_codec(Options.parse(arguments.codecs, arguments.backends, arguments.elements, budget, arguments.device), progress=progress)


def _codecs(options: Options, notes: list[str]) -> Iterator[tuple[str, Codec]]:
    """Those that there are on the device, by backend."""
    for name in options.backends:
        try:
            yield name, CODECS[name](options.device)
        except Exception as error:  # as above
            notes.append(f"{name}: {reason(error)}")


def _measure(kind: str, signals: list[torch.Tensor], found: list[Candidate], budget: Budget, clock: Clock) -> list[dict[str, Any]]:
    """The rows of one codec: all its candidates share their rounds with the copy."""
    source, target = signals[0], signals[0].clone()
    calls = {f"{candidate.facts['backend']} {candidate.facts['direction']}": candidate.call for candidate in found}
    timings = interleave({**calls, "copy": lambda: target.copy_(source)}, "copy", budget, clock) if found else {}
    copied = 2 * source.numel() * source.element_size()
    return [_row(candidate, timings[key], copied) for key, candidate in zip(calls, found, strict=True)]


def _row(candidate: Candidate, timing: Timing, copied_bytes: int) -> dict[str, Any]:
    times = {name: 1e3 * us / candidate.facts["elements"] for name, us in timing.us.items()}
    share = timing.ratio * candidate.bytes / copied_bytes
    rates = {"share_of_copy_bandwidth": share, "gb_per_s": candidate.bytes / timing.p50_us / 1e3}
    return candidate.facts | {"ns_per_element": times, "ratio_to_memcpy": timing.ratio} | rates


def _is_exact(work: Work, expected: Work) -> bool:
    """Whether both do the same to their tensors in each of the first turns, which also warm up."""
    for _ in range(TURNS):
        work.call()
        expected.call()
        if not all(torch.equal(found.view(torch.uint8), part.view(torch.uint8)) for found, part in zip(work.state, expected.state, strict=True)):
            return False
    return True


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row['ns_per_element'][name]:.4g}" for name in ("p20", "p50", "p80"))
    rates = (f"{row[name]:.2f}" for name in ("ratio_to_memcpy", "share_of_copy_bandwidth", "gb_per_s"))
    return (row["codec"], row["direction"], row["backend"], str(row["elements"]), *times, *rates)
