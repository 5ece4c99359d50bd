"""Reports: `report.json` for machines, `report.md` for pull requests, `report.html` for people; one `Report` behind all three.

`protocol.yaml` beside them is the protocol as it was run, and can be given to `--protocol` again.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from dite.errors import CheckpointError, OutputExists
from dite.outputs import check_writable, write_file
from dite_evals.schema import ADAPTER, SCHEMA_VERSION

FILE = "report.json"
PROTOCOL = "protocol.yaml"
OURS = re.compile(r"(report\.(json|html|md)|protocol\.yaml)(\..*partial)?")
FID_NAMES = {
    "fid": "FID, N = {n}",
    "fid_corrected": "FID for N → ∞, jackknife",
    "fid_infinity": "FID for N → ∞, line",
    "sfid": "sFID, N = {n}",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "cmmd": "CMMD",
    "inception_score": "inception score, 1 split",
}
PACKAGES = ("dite", "torch", "diffusers", "torchmetrics", "safetensors", "transformers")


@dataclass
class Report:
    """`metrics` are the keys of `--json`; `samples` one dict a sample; `images` and `baseline_images` uint8 [N, 3, H, W] for the HTML only."""

    kind: str
    title: str
    metrics: dict[str, Any]
    configuration: dict[str, Any]
    command: list[str]
    samples: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)
    images: torch.Tensor | None = None
    baseline_images: torch.Tensor | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    replicates: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `report.json`."""
        document = {"schema_version": SCHEMA_VERSION, "kind": self.kind, "title": self.title, "metrics": self.metrics}
        document |= {"configuration": self.configuration, "environment": environment(), "command": shlex.join(self.command)}
        document |= {"curve": [{"n": size, "fid": value} for size, value in self.curve]} if self.curve else {}
        document |= {"replicates": self.replicates} if self.replicates else {}
        return document | ({"samples": self.samples} if self.samples else {})


def environment() -> dict[str, Any]:
    """What a number may depend on besides the configuration: versions, machine, thread count."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "machine": platform.machine(),
        "gpu": device,
        "threads": torch.get_num_threads(),
    }


def check_output(folder: Path, kinds: Collection[str] = ("fidelity", "fid")) -> None:
    """Raise OutputExists unless `folder` is absent, empty, or holds an earlier report of one of `kinds`, or what was left of one."""
    check_writable(folder)
    foreign = sorted(path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)) if folder.exists() else []
    if foreign and not (folder / FILE).is_file():
        rule = f"it holds no {FILE} but {foreign[0]}, so it is no report that may be replaced"
        raise OutputExists(f"{folder} is not empty", rule, "choose another -o")
    kind = _kind(folder / FILE)
    if kind is not None and kind not in kinds:
        rule = f"{FILE} is of kind {kind}, only {' or '.join(kinds)} may be replaced"
        raise OutputExists(f"{folder} holds another report", rule, "choose another -o")


def _kind(path: Path) -> str | None:
    """What a report says that it is of; None where there is none, or it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(document.get("kind")) if isinstance(document, dict) else None


def write_report(report: Report, folder: Path) -> dict[str, str]:
    """Write the files, each renamed into place, `report.json` last; returns their paths by kind."""
    from dite_evals.report_html import render

    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = report.to_dict()
    strict = finite(document)
    ADAPTER.validate_python(strict)
    texts = {
        "html": render(report, document),
        "md": markdown(document),
        "protocol": yaml.safe_dump(report.protocol, sort_keys=False, allow_unicode=True),
        "json": json.dumps(strict, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    paths = {kind: folder / (f"report.{kind}" if kind != "protocol" else PROTOCOL) for kind in texts}
    for kind, text in texts.items():
        write_file(paths[kind], text.encode())
    return {kind: str(path) for kind, path in paths.items()}


def read_report(path: Path) -> dict[str, Any]:
    """Read a `report.json` (or the folder that holds it). Raises CheckpointError when it is none."""
    path = path / FILE if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}", str(error), "give a report.json written by dite eval") from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        why = f"its schema_version is {found!r}, expected {SCHEMA_VERSION}"
        raise CheckpointError(f"{path} is no report of this version", why, "measure again with this dite: what was drawn is kept")
    try:
        ADAPTER.validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise CheckpointError(f"{path} is damaged", f"{where}: {first['msg']}", "give the report.json that dite wrote") from error
    return dict(document)


def markdown(document: dict[str, Any]) -> str:
    """The same figures as two tables."""
    lines = [f"# {_cell(document['title'])}", "", "| metric | value |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in headline(document["metrics"])]
    lines += ["", "| configuration | |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(plain(value))} |" for key, value in document["configuration"].items()]
    left_out = document["metrics"].get("left_out") or {}
    lines += ["", "Left out: " + "; ".join(f"{name} ({_cell(why)})" for name, why in left_out.items()) + "."] if left_out else []
    versions = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    again = ["```", document["command"], "```", ""] if document["command"] else []
    return "\n".join([*lines, "", f"Environment: {versions}.", "", *again])


def headline(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The metrics that are quoted, named and with their units, in order; in brackets their 95% intervals."""
    if "psnr" in metrics:
        psnr = metrics["psnr"]
        return [
            ("PSNR, mean", _or_none(psnr["mean"], ".2f", " dB")),
            ("PSNR, worst 5%", _or_none(psnr["p05"], ".2f", " dB")),
            ("SSIM", _or_none(metrics["ssim"], ".4f")),
            ("latent relative error", _or_none(metrics["latent_relative_error"], ".4f")),
            ("samples", str(metrics["n"])),
        ]
    rows = [(FID_NAMES[name].format(n=metrics["n"]), _quoted(metrics, name)) for name in FID_NAMES if metrics.get(name) is not None]
    if metrics["n"] <= metrics.get("num_features", 0):
        rows.insert(1, ("warning", f"{metrics['n']} samples of {metrics['num_features']} features: this FID measures mostly how many they are"))
    return [*rows, ("protocol", metrics["protocol"]), ("extractor", short_id(metrics["extractor"]))]


def _or_none(value: float | None, form: str, unit: str = "") -> str:
    return "not finite" if value is None else f"{value:{form}}{unit}"


def _quoted(metrics: dict[str, Any], name: str) -> str:
    interval = metrics.get("interval" if name == "fid" else f"{name}_interval")
    return f"{metrics[name]:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def short_id(extractor: str) -> str:
    """An extractor's name and the first digits of its hash, for people.

    >>> short_id("toy/raw/sha256:0123456789abcdef")
    'toy (0123456789ab)'
    """
    return f"{extractor.partition('/')[0]} ({extractor.rpartition(':')[2][:12]})"


def plain(value: Any) -> str:
    """A configuration value as text."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return "none" if value is None else str(value)


def finite(value: Any) -> Any:
    """NaN and infinity become null: a strict JSON parser must be able to read every report."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _cell(text: str) -> str:
    """Text without Markdown or HTML of its own."""
    return re.sub(r"([\\|<>\[\]`*#])", r"\\\1", " ".join(str(text).split()))
