"""`dite report`: what was measured of one model, gathered from the files that commands wrote, as data.

A figure is taken in only if it is this model's. What decides:

    dite eval                    configuration.model_sha256, the digest of every weight in the dtype it ran in
    dite generate --nproc,       model_sha256, the same
    dite bench exchange
    dite quantize --json         the scheme of every layer, which the folder holds too (the digest of both is compared)
    dite bench forward, linear   the shapes of the linears: times depend on shapes and schemes, and on no weight's value

Nothing is measured here. A section without figures names the command that would make them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ValidationError

from dite.errors import CheckpointError, UsageError
from dite_evals.model_schema import MODEL_SCHEMA_VERSION, Exchanged, Forwards, Generated, Linears
from dite_evals.report import environment, finite, read_report

SCHEME_KEYS = ("name", "weight_bits", "activation_bits", "group_size", "transform", "rank")


@dataclass(frozen=True)
class Subject:
    """The model that a page is about.

    `layers` are its quantized linears as `dite quantize --json` tells them (name, kind, in_features, out_features, weight_bits, …; `error` where the
    folder recorded it), `linears` all of them with their shapes. `digest(dtype)` is its SHA-256 in that dtype. `plan` is what a search left.
    """

    source: str
    facts: dict[str, Any]
    dtype: str
    digest: Callable[[str], str]
    recipe: str | None = None
    layers: Sequence[dict[str, Any]] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    linears: Sequence[dict[str, Any]] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class Files:
    """What to gather from: JSON of `dite quantize`, `eval`, `bench` and `generate`, as files or (eval) the folders of reports."""

    quantization: Path | None = None
    evals: Sequence[Path] = ()
    benches: Sequence[Path] = ()
    exchanges: Sequence[Path] = ()


def gather(subject: Subject, files: Files) -> dict[str, Any]:
    """The contents of a model's `report.json`. Raises UsageError for a figure of another model, CheckpointError for a damaged file."""
    fidelity: list[dict[str, Any]] = []
    fid: list[dict[str, Any]] = []
    speed: list[dict[str, Any]] = []
    exchange: list[dict[str, Any]] = []
    for path in files.evals:
        report = read_report(path)
        (fidelity if report["kind"] == "fidelity" else fid).append(_evaluated(subject, path, report))
    for path in (*files.benches, *files.exchanges):
        document = _read(path)
        kind = _kind(document, path)
        if kind in ("linear", "forward") and path in files.exchanges:
            raise UsageError(f"{path} holds no exchange", f"it is of dite bench {kind}", f"--bench {path}")
        (speed if kind in ("linear", "forward") else exchange).append(_gathered(subject, path, document, kind))
    quantization = _quantization(subject, files.quantization)
    digests = {one["dtype"]: one["model_sha256"] for one in (*fidelity, *fid, *exchange)}
    baseline = next((one["configuration"]["baseline"] for one in fidelity), None)
    found = {"quantization": quantization, "fidelity": fidelity, "fid": fid, "speed": speed, "exchange": exchange}
    return finite(
        {
            "schema_version": MODEL_SCHEMA_VERSION,
            "kind": "model",
            "title": subject.source,
            "model": subject.facts | {"source": subject.source, "sha256": {subject.dtype: subject.digest(subject.dtype)} | digests},
            **found,
            "not_measured": _not_measured(subject, found, baseline or "BASE"),
            "environment": environment(),
        }
    )


def _evaluated(subject: Subject, path: Path, report: dict[str, Any]) -> dict[str, Any]:
    configuration = report["configuration"]
    _require(
        subject, path, configuration.get("model_sha256"), configuration.get("dtype"), shlex.join(["dite", "eval", report["kind"], subject.source])
    )
    kept = {key: report[key] for key in ("title", "metrics", "configuration", "environment", "command", "curve") if key in report}
    return {"file": str(path), "model_sha256": configuration["model_sha256"], "dtype": configuration["dtype"]} | kept


def _generated(subject: Subject, path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Of `dite generate --nproc`: bytes as sent and as they would be raw."""
    again = shlex.join(["dite", "generate", subject.source, "--nproc", "2", "-n", "8", "-o", "pictures", "--json"])
    _require(subject, path, document.get("model_sha256"), document.get("dtype"), again)
    keys = ("steps", "guidance", "seconds", "seconds_per_step", "exchange", "model_sha256", "dtype")
    return {"file": str(path), "kind": "generate", "images": len(document["images"]), "command": document.get("command", "")} | {
        key: document[key] for key in keys
    }


def _exchanged(subject: Subject, path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Of `dite bench exchange`: its rows."""
    configuration = document["configuration"]
    if isinstance(configuration["model"], dict):
        raise UsageError(
            f"{path} was measured on another model", f"on random weights of size {configuration['model'].get('size')}", _exchange_command(subject)
        )
    _require(subject, path, document.get("model_sha256"), configuration["dtype"], _exchange_command(subject))
    kept = {key: document[key] for key in ("command", "environment", "configuration", "rows", "model_sha256")}
    return {"file": str(path), "kind": "exchange", "dtype": configuration["dtype"]} | kept


def _timed(subject: Subject, path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Of `dite bench forward` and `linear`: the rows whose shapes this model has."""
    kind = _kind(document, path)
    own = {(linear["in_features"], linear["out_features"]) for linear in subject.linears}
    rows = [row for row in document["rows"] if tuple(row["shape"][1:]) in own]
    if not rows:
        theirs = sorted({"×".join(map(str, row["shape"][1:])) for row in document["rows"]})
        mine = sorted("×".join(map(str, shape)) for shape in own)
        why = f"no linear of {subject.source} has one of its shapes {', '.join(theirs)} (in × out features); they are {', '.join(mine)}"
        raise UsageError(f"{path} was measured on another model", why, _forward_command(subject, "BASE"))
    if kind == "forward":
        _require_layers(subject, path, rows)
    kept = {key: document[key] for key in ("model", "batch_size", "inputs", "command", "environment", "notes") if key in document}
    left_out = len(document["rows"]) - len(rows)
    return {"file": str(path), "kind": kind, "recipe": subject.recipe, "rows": rows, "rows_of_other_shapes": left_out} | kept


def _require_layers(subject: Subject, path: Path, rows: list[dict[str, Any]]) -> None:
    """A forward of the same recipe quantizes as many layers in the same model."""
    for row in rows:
        count = row.get("layers")
        if subject.layers and row.get("recipe") == subject.recipe and count not in (None, len(subject.layers)):
            why = f"{row['recipe']} quantized {count} layers there, {len(subject.layers)} of {subject.source}"
            raise UsageError(f"{path} was measured on another model", why, _forward_command(subject, "BASE"))


_GATHER: dict[str, tuple[Callable[[Subject, Path, dict[str, Any]], dict[str, Any]], type[BaseModel]]] = {
    "linear": (_timed, Linears),
    "forward": (_timed, Forwards),
    "exchange": (_exchanged, Exchanged),
    "generate": (_generated, Generated),
}


def _gathered(subject: Subject, path: Path, document: dict[str, Any], kind: str) -> dict[str, Any]:
    """A document's part of the page, whole. Raises CheckpointError for one that lacks something."""
    gather_one, schema = _GATHER[kind]
    why = ""
    try:
        found = gather_one(subject, path, document)
        schema.model_validate(finite(found))
        return found
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except (KeyError, TypeError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else f"it misuses a key: {error}"
    raise _damaged(path, why, f"dite {'generate' if kind == 'generate' else f'bench {kind}'}")


def _quantization(subject: Subject, path: Path | None) -> dict[str, Any] | None:
    """The layers, what they were made by and how far each is off, as far as anybody recorded it."""
    if not subject.layers:
        if path is not None:
            raise UsageError(
                f"{path} was measured on another model", f"{subject.source} is not quantized", "give the folder that dite quantize wrote"
            )
        return None
    layers, source, document = [dict(layer) for layer in subject.layers], None, {}
    if path is not None:
        document = _read(path)
        _require_scheme(subject, path, document)
        errors = {layer["name"]: (layer.get("error"), layer.get("error_of")) for layer in document["layers"]}
        layers = [layer | dict(zip(("error", "error_of"), errors[layer["name"]], strict=True)) for layer in layers]
        source = str(path)
    elif subject.plan is not None:
        source = "plan.json"
    for layer in layers:
        layer["sqnr_db"] = sqnr(layer.get("error"))
    ran = {key: document[key] for key in ("seconds", "peak_memory_bytes", "notes") if key in document}
    sizes = {key: subject.sizes[key] for key in ("bytes", "baseline_bytes") if key in subject.sizes}
    return {
        "recipe": subject.recipe,
        **sizes,
        "errors_from": source,
        "kinds": _kinds(layers),
        "layers": layers,
        "skipped": subject.skipped,
        "plan": subject.plan,
        **ran,
    }


def sqnr(error: float | None) -> float | None:
    """dB from a relative error ‖y − ŷ‖ ÷ ‖y‖; None where there is none, or it is zero.

    >>> sqnr(0.1), sqnr(None)
    (20.0, None)
    """
    return None if error is None or not math.isfinite(error) or error <= 0 else -20 * math.log10(error)


def _kinds(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that are quantized alike, counted; the most weights first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(tuple(layer.get(key) for key in ("kind", "weight_bits", "activation_bits", "group_size")), []).append(layer)
    found = []
    for (kind, weight_bits, activation_bits, group_size), some in groups.items():
        weights = sum(layer["in_features"] * layer["out_features"] for layer in some)
        known = [layer["sqnr_db"] for layer in some if layer["sqnr_db"] is not None]
        stored = sum(layer["bytes"] for layer in some) if all(layer.get("bytes") is not None for layer in some) else None
        row = {"kind": kind, "weight_bits": weight_bits, "activation_bits": activation_bits, "group_size": group_size, "layers": len(some)}
        row |= {"weights": weights, "bytes": stored, "bits_per_weight": 8 * stored / weights if stored is not None else None}
        row |= {"sqnr_db": {"median": median(known), "worst": min(known)} if known else None}
        row |= {"transforms": sorted({str(layer.get("transform") or "none") for layer in some})}
        found.append(row)
    return sorted(found, key=lambda row: -row["weights"])


def _not_measured(subject: Subject, found: dict[str, Any], baseline: str) -> list[dict[str, str]]:
    """Sections without figures, and the command for each."""
    recipe = subject.recipe or "w4a8"
    quantize = (
        shlex.join(["dite", "quantize", baseline, "--recipe", recipe, "-o", f"{Path(subject.source).name}-again", "--json"]) + " > quantize.json"
    )
    commands = []
    if subject.layers and not any(layer["sqnr_db"] is not None for layer in found["quantization"]["layers"]):
        commands.append({"section": "error of each layer", "command": f"{quantize}; then --quantization quantize.json"})
    if not found["fidelity"]:
        words = ["dite", "eval", "fidelity", subject.source, "--baseline", baseline, "--n", "128", "-o", "fidelity"]
        commands.append({"section": "fidelity", "command": f"{shlex.join(words)}; then --eval fidelity"})
    if not found["fid"]:
        words = ["dite", "eval", "fid", subject.source, "--protocol", "NAME", "-o", "fid"]
        commands.append({"section": "fid", "command": f"{shlex.join(words)}; then --eval fid"})
    if not found["speed"]:
        original = baseline if subject.layers else subject.source
        commands.append({"section": "speed", "command": f"{_forward_command(subject, original)}; then --bench forward.json"})
    if not found["exchange"]:
        commands.append({"section": "exchange", "command": f"{_exchange_command(subject)}; then --exchange exchange.json"})
    return commands


def _forward_command(subject: Subject, baseline: str) -> str:
    """A bench rounds a bare model, so a searched recipe is stood in for by the default one."""
    recipe = subject.recipe if subject.recipe and subject.plan is None else "w4a8"
    return shlex.join(["dite", "bench", "forward", baseline, "--recipes", recipe, "-o", "forward.json"])


def _exchange_command(subject: Subject) -> str:
    return shlex.join(["dite", "bench", "exchange", subject.source, "--nproc", "2", "-o", "exchange.json"])


def _require(subject: Subject, path: Path, theirs: str | None, dtype: str | None, again: str) -> None:
    """Raise UsageError unless the digest that a file carries is this model's in the same dtype."""
    if not theirs or not dtype:
        why = "it carries no model_sha256 and dtype: it is older than they are, or was edited"
        raise UsageError(f"{path} doesn't say which model it was measured on", why, f"measure again: {again}")
    ours = subject.digest(dtype)
    if theirs != ours:
        raise UsageError(
            f"{path} was measured on another model",
            f"its model_sha256 is {theirs}, {subject.source} in {dtype} has {ours}",
            f"measure this one: {again}",
        )


def _require_scheme(subject: Subject, path: Path, document: dict[str, Any]) -> None:
    try:
        theirs, ours = _scheme_digest(document["layers"]), _scheme_digest(subject.layers)
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"a layer of it lacks {error}", "dite quantize --json") from error
    if theirs != ours:
        why = f"the schemes of its {len(document['layers'])} layers have the digest {theirs}, those of {subject.source} {ours}"
        raise UsageError(f"{path} was measured on another model", why, "give what the `dite quantize --json` that wrote this folder printed")


def _scheme_digest(layers: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of how each layer is quantized."""
    schemes = sorted([layer[key] for key in SCHEME_KEYS] for layer in layers)
    return hashlib.sha256(json.dumps(schemes).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}", str(error), "give a file that dite's --json or -o wrote") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is none of dite's documents", f"it holds a {type(document).__name__}", "give a file that dite wrote")
    return document


def _kind(document: dict[str, Any], path: Path) -> str:
    """What wrote a document: bench `linear`, `forward` or `exchange`, or `generate` on several ranks."""
    rows = document.get("rows")
    if document.get("kind") in ("fidelity", "fid"):
        raise UsageError(f"{path} is a report of dite eval", f"its kind is {document['kind']}", f"--eval {path}")
    if "images" in document and "seconds_per_step" in document:
        if not document.get("exchange"):
            raise UsageError(f"{path} holds no exchange", "the pictures were drawn on one device", "draw them with --nproc 2")
        return "generate"
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    if "mode" in first and "configuration" in document:
        return "exchange"
    if "shape" in first and first.get("op") in ("forward", "linear", "ceiling"):
        return "forward" if first["op"] == "forward" else "linear"
    known = "dite bench linear, forward or exchange, and dite generate --nproc"
    raise UsageError(f"{path} is of no kind that belongs on this page", f"known: {known}", "give what their -o or --json wrote")


def _damaged(path: Path, why: str, writer: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged", why, f"give what {writer} wrote")
