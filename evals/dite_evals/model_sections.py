"""What a model's page says, as text and tables, for HTML and Markdown alike.

Every block of figures carries what they depend on: N, settings, interval, extractor, the digest of the model, and the command.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dite_evals.plan_map import size_text
from dite_evals.report import headline

SETTINGS = ("n", "steps", "guidance", "seed", "micro_batch", "dtype", "device")
DIGITS = 12  # of a digest, in text; the whole ones are in the table of the model and in report.json


@dataclass(frozen=True)
class Table:
    """`rows` of text under `columns`; from column `numbers` on they are numbers. `this`: the rows that stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1
    this: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Block:
    """Figures of one file: `facts` (name, value), tables, what they `depend` on, and the `command`. `data` is the file's part of the document."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    depends: str = ""
    command: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A heading, what the figures under it mean, and the blocks; none: not measured, and the command that measures it."""

    key: str
    title: str
    lead: str
    blocks: Sequence[Block] = ()
    missing: str = ""


def sections(document: dict[str, Any]) -> list[Section]:
    """The page, in order."""
    missing = {entry["section"]: entry["command"] for entry in document["not_measured"]}
    fidelity = [_evaluated(entry, "fidelity") for entry in document["fidelity"]]
    fid = [_evaluated(entry, "fid") for entry in document["fid"]]
    speed = [_forward(entry) if entry["kind"] == "forward" else _linear(entry) for entry in document["speed"]]
    exchange = [_exchanged(entry) if entry["kind"] == "exchange" else _generated(entry) for entry in document["exchange"]]
    return [
        Section("quantization", "Quantization", *_quantization(document), missing=missing.get("error of each layer", "")),
        Section(
            "fidelity",
            "Quality, paired with the original",
            "The same seeds and conditions drawn by both models. Higher PSNR and SSIM mean closer to the original.",
            fidelity,
            missing.get("fidelity", ""),
        ),
        Section(
            "fid",
            "Quality, against a data set",
            "A lower FID is closer. It compares only with FIDs of the same protocol, N and extractor; intervals are of 95%.",
            fid,
            missing.get("fid", ""),
        ),
        Section(
            "speed",
            "Speed",
            "Ratios above 1 are faster. Times depend on shapes and schemes, and on no weight's value: these benches were checked by the shapes of "
            "this model's linears, and they quantize the original by rounding.",
            speed,
            missing.get("speed", ""),
        ),
        Section(
            "exchange", "Several devices", "What ranks send each other, and how long steps take where they do.", exchange, missing.get("exchange", "")
        ),
    ]


def tiles_of(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures one looks for first, each with what it depends on in its name."""
    found = [("transformer's weights", size_text(document["model"]["bytes"]))]
    quantization = document["quantization"]
    if quantization:
        ratio = quantization["baseline_bytes"] / quantization["bytes"]
        wide = f"as large as in bf16: what is not quantized is {document['model']['dtype']}"
        found.append(("smaller than in bf16", f"{ratio:.2f}×") if ratio > 1 else (wide, f"{1 / ratio:.2f}×"))
    for entry in document["fidelity"][:1]:
        psnr, n = entry["metrics"]["psnr"], entry["metrics"]["n"]
        found.append((f"PSNR, N = {n} ({interval(psnr['interval'])})", _number(psnr["mean"], ".1f", " dB")))
    for entry in document["fid"][:1]:
        metrics = entry["metrics"]
        name = metrics["extractor"].partition("/")[0]
        found.append((f"FID by {name}, N = {metrics['n']} ({interval(metrics['interval'])})", _number(metrics["fid"], ".4g")))
    own = [row for entry in document["speed"] if entry["kind"] == "forward" for row in entry["rows"] if _is_own(entry, row)]
    if own:
        best = max(own, key=lambda row: row["ratio_to_baseline"])
        found.append((f"as fast as {best['baseline']}, forward", f"{best['ratio_to_baseline']:.2f}×"))
    for entry in (entry for entry in document["exchange"] if entry["kind"] == "generate"):
        told = entry["exchange"]
        found.append((f"of raw bytes sent, {told['mode']}, {told['codec']}, {told['ranks']} ranks", _share(told)))
        break
    return found


def model_facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The model itself, with its whole digests."""
    model = document["model"]
    facts = [("model", model["source"]), ("class", f"{model['model_class']} in {model.get('pipeline', 'no pipeline')}")]
    facts += [("parameters", f"{model['parameters']:,}"), ("transformer's weights on disk", size_text(model["bytes"]))]
    return facts + [(f"SHA-256 in {dtype}", digest) for dtype, digest in model["sha256"].items()]


def interval(bounds: Sequence[float | None]) -> str:
    """Both ends as text.

    >>> interval([6.18, None])
    '6.18 to ?'
    """
    return " to ".join(_number(bound, ".4g") for bound in bounds)


def _quantization(document: dict[str, Any]) -> tuple[str, list[Block]]:
    found = document["quantization"]
    if found is None:
        return f"Not quantized: the weights are as they were stored, in {document['model'].get('dtype')}.", []
    bits = [row["bits_per_weight"] for row in found["kinds"]]
    weights = sum(row["weights"] for row in found["kinds"])
    facts = [
        ("recipe", str(found["recipe"] or "not recorded")),
        ("transformer's weights", f"{size_text(found['bytes'])}; {size_text(found['baseline_bytes'])} in bf16"),
        ("layers", f"{len(found['layers'])} quantized, {len(found['skipped'])} left alone"),
    ]
    if all(one is not None for one in bits):
        mean = sum(row["bits_per_weight"] * row["weights"] for row in found["kinds"]) / weights
        facts.append(("bits a quantized weight", f"{mean:.2f}, scales and all"))
    facts += [("took", f"{found['seconds']:.0f} s, peak memory {size_text(found['peak_memory_bytes'])}")] if "seconds" in found else []
    facts += [("note", str(note)) for note in found.get("notes", [])]
    rows = [
        [
            row["kind"],
            f"{row['weight_bits']}",
            f"{row['activation_bits'] or 'as it is'}",
            f"{row['group_size'] or 'channel'}",
            f"{row['layers']}",
            f"{row['weights'] / weights:.0%}",
            _number(row["bits_per_weight"], ".2f"),
            _number((row["sqnr_db"] or {}).get("median"), ".1f"),
            _number((row["sqnr_db"] or {}).get("worst"), ".1f"),
        ]
        for row in found["kinds"]
    ]
    columns = ("kind", "weight bits", "activation bits", "group", "layers", "of the weights", "bits a weight", "SQNR dB, median", "SQNR dB, worst")
    model = document["model"]
    depends = [f"SQNR of {errors_of(found['layers'])}, from {found['errors_from']}"] if found["errors_from"] else []
    depends.append(_digest({"model_sha256": model["sha256"][model["dtype"]]}))
    lead = "Bits a weight include scales, zero points and low-rank parts. SQNR is signal to quantization noise, 20·log₁₀ of 1 ÷ relative error."
    return lead, [Block("", facts, [Table(columns, rows)], " · ".join(depends), data=found)]


def errors_of(layers: Sequence[dict[str, Any]]) -> str:
    """What the layers' errors are of."""
    if any(layer.get("error_of") == "outputs" for layer in layers):
        return "a layer's output on inputs it was not calibrated on"
    return "a layer's weights"


def _evaluated(entry: dict[str, Any], kind: str) -> Block:
    metrics, configuration = entry["metrics"], entry["configuration"]
    facts = [fact for fact in headline(_numbers(metrics)) if fact[0] not in ("samples", "protocol", "extractor")]
    if kind == "fidelity":
        facts.insert(1, ("95% interval of its mean", f"{interval(metrics['psnr']['interval'])} dB"))
    of = f"against {configuration.get('baseline', '')}" if kind == "fidelity" else f"protocol {configuration.get('protocol', '')}"
    settings = {"n": metrics["n"]} | {key: configuration[key] for key in SETTINGS if configuration.get(key) is not None}
    depends = [_setting(key, value) for key, value in settings.items()]
    if kind == "fid":
        depends.append(f"extractor {metrics['extractor']}")
        depends.append(f"reference {configuration.get('reference')}, {configuration.get('reference_n')} images")
    else:
        depends.append(f"baseline {str(configuration.get('baseline_sha256'))[:DIGITS]}…")
    if metrics["overrides"]:
        depends.append(f"changed from {metrics['protocol']}: {', '.join(metrics['overrides'])}")
    if configuration.get("exchange"):
        depends.append(f"shared out: {configuration['exchange']}")
    return Block(of, facts, (), " · ".join([*depends, _digest(entry)]), entry["command"], entry)


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Fidelity with NaN where the file had to say null: an infinite PSNR, say."""
    if "psnr" not in metrics:
        return metrics
    known = {key: math.nan if metrics[key] is None else metrics[key] for key in ("ssim", "latent_relative_error")}
    return metrics | known | {"psnr": {key: math.nan if value is None else value for key, value in metrics["psnr"].items()}}


def _setting(key: str, value: Any) -> str:
    return {"n": f"N = {value}", "steps": f"{value} steps", "dtype": str(value), "device": f"on {value}"}.get(key, f"{key.replace('_', '-')} {value}")


def _forward(entry: dict[str, Any]) -> Block:
    rows, this = [], set()
    for at, row in enumerate(entry["rows"]):
        times = [f"{row['us'][name] / 1e3:.1f}" for name in ("p20", "p50", "p80")]
        sizes = [size_text(row["weight_bytes"]), size_text(row["held_bytes"])]
        rows.append([row["name"], row["backend"], *times, f"{row['ratio_to_baseline']:.2f}", *sizes, f"{row['output_relative_error']:.3f}"])
        this |= {at} if _is_own(entry, row) else set()
    columns = ("variant", "backend", "p20 ms", "p50 ms", "p80 ms", "ratio", "weights", "in memory", "output error")
    depends = [f"{entry.get('model')}", f"batch {entry.get('batch_size')}", f"ratio to {entry['rows'][0]['baseline']}", *_machine(entry)]
    title = (
        "Whole forwards" if this else f"Whole forwards, none by this model's recipe ({entry['recipe']})" if entry.get("recipe") else "Whole forwards"
    )
    return Block(title, (), [Table(columns, rows, 2, frozenset(this))], " · ".join(depends), entry["command"], entry)


def _linear(entry: dict[str, Any]) -> Block:
    rows = []
    for row in entry["rows"]:
        times = [f"{row['us'][name]:.0f}" for name in ("p20", "p50", "p80")]
        quantized = f"w{row['weight_bits']}a{row['activation_bits'] or 16}" + (f" g{row['group_size']}" if row.get("group_size") else "")
        scheme = quantized if row["weight_bits"] < 16 else "bf16"
        rows.append(["×".join(map(str, row["shape"])), row["op"], row["backend"], scheme, *times, f"{row['ratio_to_baseline']:.2f}"])
    columns = ("tokens × in × out", "op", "backend", "scheme", "p20 µs", "p50 µs", "p80 µs", "ratio")
    left_out = entry.get("rows_of_other_shapes")
    depends = [f"ratio to {entry['rows'][0]['baseline']}", *_machine(entry), *([f"{left_out} rows of other shapes left out"] if left_out else [])]
    return Block("Single linears", (), [Table(columns, rows, 4)], " · ".join(depends), entry["command"], entry)


def _exchanged(entry: dict[str, Any]) -> Block:
    rows = []
    for row in sorted(entry["rows"], key=lambda row: (row["link"], row["seconds_per_step"])):
        ms = [f"{1e3 * row[name]:.1f}" for name in ("seconds_per_step", "keyframe_seconds")]
        ratios = [_number(row.get(name), ".2f") for name in ("ratio_to_one_device", "ratio_to_best_raw_synchronous")]
        rows.append(
            [row["link"], row["mode"], row["codec"], *ms, *ratios, f"{row['bytes_per_step'] / 1e3:.1f}", f"{row['latent_relative_error']:.2g}"]
        )
    columns = ("link", "mode", "codec", "ms a step", "keyframe ms", "× one device", "× best raw", "kB a step", "latent error")
    asked = entry["configuration"]
    depends = [f"{asked['ranks']} ranks", f"{asked['steps']} steps, {asked['rounds']} rounds", f"batch {asked['batch_size']}", asked["dtype"]]
    return Block("Steps", (), [Table(columns, rows, 3)], " · ".join([*depends, *_machine(entry), _digest(entry)]), entry["command"], entry)


def _generated(entry: dict[str, Any]) -> Block:
    told = entry["exchange"]
    facts = [
        ("sent by a rank", f"{size_text(told['bytes_sent'])}, headers and keyframes included"),
        ("the same uncompressed", size_text(told["bytes_raw"])),
        ("of raw", _share(told)),
        ("seconds a step", f"{entry['seconds_per_step']:.3f}"),
    ]
    depends = [f"N = {entry['images']}", f"{entry['steps']} steps", f"guidance {entry['guidance']}", f"{told['ranks']} ranks", told["mode"]]
    depends += [f"codec {told['codec']}", f"order {told['order']}", entry["dtype"], _digest(entry)]
    return Block("Pictures", facts, (), " · ".join(depends), entry["command"], entry)


def _share(told: dict[str, Any]) -> str:
    return f"{told['bytes_sent'] / told['bytes_raw']:.1%}" if told["bytes_raw"] else "none sent"


def _machine(entry: dict[str, Any]) -> list[str]:
    environment = entry.get("environment") or {}
    cpu = environment.get("cpu") or {}
    device = environment.get("gpu") if environment.get("gpu") not in (None, "none") else cpu.get("name")
    threads = environment.get("threads")
    return (
        [str(device)] * bool(device)
        + [f"{threads} thread{'s' if threads != 1 else ''}"] * bool(threads)
        + [f"torch {environment.get('torch')}"] * ("torch" in environment)
    )


def _is_own(entry: dict[str, Any], row: dict[str, Any]) -> bool:
    return bool(entry.get("recipe")) and row.get("recipe") == entry["recipe"]


def _digest(entry: dict[str, Any]) -> str:
    return f"model {entry['model_sha256'][:DIGITS]}…"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "?" if value is None else f"{value:{form}}{unit}"
