"""How other quantizers do on a dite model, as data: bytes and paired fidelity, each library called as its own documentation says.

    pip install --no-deps -r evals/peers-requirements.txt
    python evals/peers.py --out docs/results/peers.json [--model builtin:cifar10-dit] [--peers "optimum-quanto;sdnq int8"] [--n 128]

A row is written as soon as it is measured, and an interrupted run goes on with the next one; processes with different `--peers` (libraries, or
names of rows as peer_calls.py in dite_evals has them) may share an `--out`. A setting that fails gets a row that says how; remove the row to try
it again.

Every library quantizes the linears that the recipe w4a8 does, all of them alike, and no others: in `setting`, LAYERS stands for their names (for
a filter that knows them) and OTHERS for those of all other linears. dite's own w4a8 keeps the timestep embedders at 8 bits.

Fidelity is measured as evals/quality_table.py does: loaded, quantized and run in float32 (in bfloat16, with a bfloat16 baseline, where float32 is
refused: `dtype` says so). Settings that leave activations alone are run on the matrices that their layers turn out to be (`expanded`), since
several of these libraries' CPU paths take minutes.

    bytes                  weights on disk as the library stores them after quantizing the bf16 model, layers left alone in bf16
    bytes_if_packed        the same, if codes narrower than a byte were not stored in whole bytes; only where that differs
    bytes_float32_scales   the same as `bytes`, with scales (and SVD factors) as wide as in the float32 model whose fidelity was measured

What quantizing the bf16 model itself costs beside that is small: over 16 pairs 0.7 dB at 8 bits, within 0.5 dB, up or down, at 4.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dite
from dite.errors import DiteError, QuantizationError
from dite_evals.peer_calls import PEERS, Peer, plain_tensors
from dite_evals.report import environment

LAYERS_OF = "w4a8"  # the recipe whose linears everyone quantizes
FIDELITY = {"steps": 20, "guidance": 2.0}
DTYPES = ("float32", "bfloat16")  # of the arithmetic, in order of preference
STORED_DTYPE = "bfloat16"
FID_DTYPE = "bfloat16"
EXPANDED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # sums in another order, and no more


def main() -> None:
    arguments = parse()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text())))
        return
    document = read(arguments)
    if document["configuration"] != configuration(arguments):
        sys.exit(f"{arguments.out} was made with {document['configuration']}; choose another --out, or remove it")
    for peer in chosen(arguments.peers):
        row = next((row for row in read(arguments)["rows"] if key_of(row) == (peer.name, peer.group_size)), None)
        if row is not None and not wants_fid(row, arguments):
            continue
        row = row or {"name": peer.name, "group_size": peer.group_size, "peer": peer.library, "version": version_of(peer), "setting": str(peer)}
        measure(row, peer, arguments)
        add(row, arguments)
        print(json.dumps(row), file=sys.stderr, flush=True)


def chosen(wanted: list[str]) -> list[Peer]:
    """The peers of the libraries or row names in `wanted`; all for an empty list."""
    unknown = [name for name in wanted if not any(name in (peer.library, peer.name) for peer in PEERS)]
    if unknown:
        sys.exit(f"no peer is called {unknown[0]!r}; there are {', '.join(dict.fromkeys(peer.name for peer in PEERS))}")
    return [peer for peer in PEERS if not wanted or peer.library in wanted or peer.name in wanted]


def version_of(peer: Peer) -> str:
    try:
        return version(peer.library)
    except PackageNotFoundError:
        sys.exit(f"{peer.library} is not installed; pip install --no-deps -r evals/peers-requirements.txt")


def measure(row: dict[str, Any], peer: Peer, arguments: argparse.Namespace) -> None:
    """Fill what is missing in a row: sizes and fidelity, or the error; then FID where it is asked for."""
    if peer.declined:
        row["error"] = peer.declined
    elif "bytes" not in row:
        failures = []
        for dtype in DTYPES:
            try:
                row |= fidelity(peer, arguments, dtype)
                break
            except DiteError:
                raise
            except Exception as error:  # whatever a library raises here is what there is to say about it
                failures.append(f"{dtype}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}")
        else:
            row["error"] = "; ".join(failures)
        if "bytes" in row and failures:
            row["refused"] = "; ".join(failures)
        if peer.note:
            row["note"] = peer.note
    if wants_fid(row, arguments):
        pipe, _ = build(peer, arguments.model, FID_DTYPE)
        found = dite.evaluate(pipe, "cifar10-5k", n=arguments.fid)
        row["fid"] = {key: found[key] for key in ("fid", "n", "interval", "fid_infinity", "extractor", "seconds")}


def wants_fid(row: dict[str, Any], arguments: argparse.Namespace) -> bool:
    return bool(arguments.fid) and "bytes" in row and row.get("fid", {}).get("n") != arguments.fid


def fidelity(peer: Peer, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Sizes, time and quality of one setting, computed in `dtype`."""
    pipe, seconds = build(peer, arguments.model, dtype)
    stored, again = build(peer, arguments.model, STORED_DTYPE)
    layers, baseline = given(arguments.model)
    size, packed = stored_bytes(stored.transformer.state_dict(), layers)
    wide, _ = stored_bytes(pipe.transformer.state_dict(), layers)
    facts = {"dtype": dtype, "layers": len(layers), "bytes": size, "ratio": baseline / size}
    facts |= {"bytes_if_packed": packed} if packed != size else {}
    facts |= {"bytes_float32_scales": wide} if dtype == "float32" and wide != size else {}
    left = sorted(layers - touched(pipe.transformer.state_dict(), layers))
    facts |= {"left_alone": left} if left else {}
    if peer.weights_only:
        expand_(pipe.transformer, layers)
        facts["expanded"] = True
    found = dite.evaluate(pipe, "fidelity-128", baseline=arguments.model, **FIDELITY, dtype=dtype, n=arguments.n)
    facts |= {key: found[key] for key in ("n", "psnr", "ssim", "latent_relative_error", "per_step_error")}
    return facts | {"seconds_to_quantize": round(min(seconds, again), 2)}  # the quicker: the first call of a library may compile


def build(peer: Peer, model: str, dtype: str) -> tuple[Any, float]:
    """The model as the peer quantizes it, and how many seconds that took."""
    pipe, (layers, _) = dite.Pipeline.from_pretrained(model, dtype=dtype), given(model)
    before = {name: value.dtype for name, value in pipe.transformer.state_dict().items()}
    torch.manual_seed(0)  # a truncated SVD starts from noise
    start = time.perf_counter()
    peer.quantize_(pipe.transformer, layers)
    seconds = time.perf_counter() - start
    after = plain_tensors(pipe.transformer.state_dict())
    others = [name for name, value in after if owner(name, layers) is None and before.get(name) != value.dtype]
    assert not others, f"{peer} changed {others[0]}, which it was not given"
    return pipe, seconds


@torch.no_grad()
def expand_(transformer: nn.Module, layers: Collection[str]) -> None:
    """Replace quantized layers by plain linears that do the same: a layer without its bias turns the identity into its weight.

    Raises QuantizationError for a layer that is no matrix after all, found by putting noise through both.
    """
    generator = torch.Generator().manual_seed(0)
    for name in sorted(layers):
        layer = transformer.get_submodule(name)
        bias = layer.bias
        like = {"dtype": next(transformer.parameters()).dtype}
        noise = torch.randn(8, layer.in_features, generator=generator).to(**like)
        wanted = layer(noise)
        layer.bias = None
        weight = layer(torch.eye(layer.in_features, **like)).T.contiguous()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, **like)
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
        error = (plain(noise) - wanted).norm() / wanted.norm()
        if error > EXPANDED_ERROR[like["dtype"]]:
            raise QuantizationError(f"layer {name} can't be expanded", f"its matrix is off by {error:.1e} on noise", "run it as it is")
        transformer.set_submodule(name, plain)


@cache
def given(model: str) -> tuple[frozenset[str], int]:
    """The linears that everyone quantizes, of the model's one transformer, and what its weights take in bf16."""
    report = dite.quantize(dite.Pipeline.from_pretrained(model), LAYERS_OF)
    return frozenset(row["name"] for row in report.layers), report.baseline_bytes


def owner(name: str, layers: Collection[str]) -> str | None:
    """The layer that a tensor of a state dict belongs to: names go on with dots inside it.

    >>> owner("blocks.1.q.weight.qdata", {"blocks.1.q", "blocks.11.q"})
    'blocks.1.q'
    """
    parts = name.split(".")
    return next((prefix for end in range(len(parts), 0, -1) if (prefix := ".".join(parts[:end])) in layers), None)


def touched(state: Mapping[str, Any], layers: Collection[str]) -> set[str]:
    """The layers that hold anything but a weight and a bias."""
    return {layer for name, value in plain_tensors(state) if (layer := owner(name, layers)) and not _as_it_was(name, value, layer)}


def stored_bytes(state: Mapping[str, Any], layers: Collection[str]) -> tuple[int, int]:
    """Bytes of a transformer's weights on disk, and what they would be with narrow codes packed.

    Counted as they are stored: every tensor that quantizing put into one of `layers` (packed int4 comes as half as many bytes as it has elements).
    Counted as bf16, whatever it is here: everything else, biases included.
    """
    size = packed = 0
    for name, value in state.items():
        bits = _code_bits(value)
        for part, tensor in plain_tensors({name: value}):
            layer = owner(part, layers)
            kept = layer is None or _as_it_was(part, tensor, layer)
            count = tensor.numel() * (2 if kept else tensor.element_size())
            codes = bits is not None and tensor.dtype in (torch.int8, torch.uint8) and tensor.numel() == value.numel()
            size += count
            packed += -(-tensor.numel() * bits // 8) if codes else count
    return size, packed


def _as_it_was(name: str, tensor: torch.Tensor, layer: str) -> bool:
    return name in (f"{layer}.weight", f"{layer}.bias") and tensor.dtype.is_floating_point


def _code_bits(value: Any) -> int | None:
    """How many bits a code of one of torchao's unpacked tensors has: it says `target_dtype`, torch.int1 to torch.int7."""
    name = str(getattr(value, "target_dtype", ""))
    return int(name.removeprefix("torch.int")) if name in {f"torch.int{bits}" for bits in range(1, 8)} else None


def key_of(row: dict[str, Any]) -> tuple[str, int | None]:
    return row["name"], row["group_size"]


def read(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured so far, or an empty document."""
    return json.loads(arguments.out.read_text()) if arguments.out.exists() else start(arguments)


def add(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write a row into the document, which other processes may have added rows to meanwhile; rows keep the order of PEERS."""
    document = read(arguments)
    rows = {key_of(one): one for one in document["rows"]} | {key_of(row): row}
    order = [(peer.name, peer.group_size) for peer in PEERS]
    document["rows"] = [rows[key] for key in [*order, *(key for key in rows if key not in order)] if key in rows]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, arguments.out)


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """An empty document: what was run (all rows of it, however many processes shared them), where, and how."""
    command = f"python evals/peers.py --out {arguments.out} --model {arguments.model} --n {arguments.n}"
    return {"command": command, "environment": environment(), "configuration": configuration(arguments), "rows": []}


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the numbers; how many samples a FID is of stands beside it."""
    fidelity = {"protocol": "fidelity-128", "n": arguments.n, **FIDELITY}
    return {"model": arguments.model, "layers_of": LAYERS_OF, "fidelity": fidelity, "fid": {"protocol": "cifar10-5k", "dtype": FID_DTYPE}}


def markdown(document: dict[str, Any]) -> str:
    """The rows that ran, as a table."""
    lines = ["| quantizer | group | transformer | smaller | PSNR | latent error |", "|---|---|---|---|---|---|"]
    for row in (row for row in document["rows"] if "bytes" in row):
        quality = [f"{row['psnr']['mean']:.1f} dB", f"{row['latent_relative_error']:.3f}"]
        cells = [row["name"], str(row["group_size"] or ""), f"{row['bytes'] / 1e6:.1f} MB", f"{row['ratio']:.2f}×", *quality]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write, or to go on with")
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--n", type=int, default=128, help="pairs for PSNR and latent error")
    parser.add_argument("--peers", type=lambda text: text.split(";"), default=[], help="only these libraries or rows")
    parser.add_argument("--fid", type=int, default=0, help="samples for FID; 0 leaves it out")
    parser.add_argument("--markdown", action="store_true", help="print the table of an existing --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
