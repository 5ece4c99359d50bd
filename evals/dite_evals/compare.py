"""Two reports side by side, if their figures may be compared at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dite.errors import CheckpointError, UsageError
from dite_evals.report import read_report

FIGURES = {"fidelity": ("psnr.mean", "psnr.p05", "ssim", "latent_relative_error"), "fid": ("fid", "fid_infinity")}
SETTINGS = ("protocol", "n", "steps", "guidance", "seed", "baseline_sha256", "reference_sha256")


def compare_reports(first: Path, second: Path) -> dict[str, Any]:
    """`{kind, rows: [{metric, a, b, difference}], verdict}` of two `report.json`.

    Raises UsageError when kind, extractor or settings differ: the difference would then measure the settings.
    """
    try:
        return _compared(read_report(first), read_report(second))
    except (KeyError, TypeError, ValueError) as error:
        what = f"{first} or {second} is damaged"
        raise CheckpointError(what, f"a report lacks or misuses {error}", "measure again, or give the report.json that dite wrote") from error


def _compared(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    facts_a, facts_b = _facts(a), _facts(b)
    apart = [key for key in facts_a if facts_a[key] != facts_b[key]]
    apart = ["kind"] if "kind" in apart else apart
    if apart:
        why = "; ".join(f"{key} is {facts_a[key]} in A and {facts_b[key]} in B" for key in apart)
        raise UsageError("these reports can't be compared", why, "measure both under one protocol, with the same settings")
    rows = []
    for metric in FIGURES[a["kind"]]:
        left, right = _at(a["metrics"], metric), _at(b["metrics"], metric)
        rows.append({"metric": metric, "a": left, "b": right, "difference": right - left})
    return {"kind": a["kind"], "rows": rows, "verdict": _verdict(a, b)}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    settings = {key: report.get("configuration", {}).get(key) for key in SETTINGS}
    return {"kind": report["kind"], "extractor": report["metrics"].get("extractor")} | settings | {"n": report["metrics"]["n"]}


def _verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    key = "fid" if a["kind"] == "fid" else "psnr"
    low_a, high_a = a["metrics"]["interval"] if key == "fid" else a["metrics"]["psnr"]["interval"]
    low_b, high_b = b["metrics"]["interval"] if key == "fid" else b["metrics"]["psnr"]["interval"]
    if max(low_a, low_b) <= min(high_a, high_b):
        return f"the 95% intervals of {key} overlap: this N does not tell the two apart by them alone"
    return f"the 95% intervals of {key} do not overlap"


def _at(metrics: dict[str, Any], path: str) -> float:
    value: Any = metrics
    for part in path.split("."):
        value = value[part]
    return float("nan") if value is None else float(value)
