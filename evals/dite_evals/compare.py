"""Two reports side by side, if their figures may be compared at all, with the interval of each difference.

Both models drew the same seeds, so that samples pair up: what an easy seed gives to both cancels out, and the difference is known better than
either figure. PSNR and latent error are paired sample by sample; FID and the like by the groups of samples that their jackknife leaves out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dite.errors import UsageError
from dite_evals.fidelity import mean_interval
from dite_evals.figures import NAMES
from dite_evals.intervals import LEVEL, Estimate, Replicates, difference
from dite_evals.report import read_report

FIGURES = {"fidelity": ("psnr.mean", "psnr.p05", "ssim", "latent_relative_error"), "fid": NAMES}
PER_SAMPLE = {"psnr.mean": "psnr", "latent_relative_error": "latent_relative_error"}
DECIDES = {"fidelity": "psnr.mean", "fid": "fid"}
SETTINGS = ("n", "steps", "guidance", "seed", "micro_batch", "prompts", "baseline_sha256", "reference_sha256", "reference_moments_sha256")
OF_REFERENCE_FEATURES = ("kid", "precision", "recall", "cmmd")


def compare_reports(first: Path, second: Path) -> dict[str, Any]:
    """`{kind, rows: [{metric, a, b, difference, interval}], verdict}` of two `report.json`; `interval` of the difference at 95%, None where the
    reports don't hold what it takes. A metric is left out that either lacks, or that was measured against other features of the reference.

    Raises UsageError when kind, extractor or settings differ: the difference would then measure the settings.
    """
    a, b = read_report(first), read_report(second)
    facts_a, facts_b = _facts(a), _facts(b)
    apart = [key for key in facts_a if facts_a[key] != facts_b[key]]
    apart = ["kind"] if "kind" in apart else apart
    if apart:
        why = "; ".join(f"{key} is {facts_a[key]} in A and {facts_b[key]} in B" for key in apart)
        raise UsageError("these reports can't be compared", why, "measure both under one protocol, with the same settings")
    rows = []
    same = a["configuration"].get("reference_features_sha256") == b["configuration"].get("reference_features_sha256")
    for metric in (name for name in FIGURES[a["kind"]] if same or name not in OF_REFERENCE_FEATURES):
        left, right = _at(a["metrics"], metric), _at(b["metrics"], metric)
        if left is not None and right is not None:
            rows.append({"metric": metric, "a": left, "b": right, "difference": right - left, "interval": _interval(a, b, metric)})
    return {"kind": a["kind"], "rows": rows, "verdict": _verdict(a["kind"], rows)}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    settings = {key: report["configuration"].get(key) for key in SETTINGS}
    return {"kind": report["kind"], "extractor": report["metrics"].get("extractor")} | settings | {"n": report["metrics"]["n"]}


def _interval(a: dict[str, Any], b: dict[str, Any], metric: str) -> list[float] | None:
    if a["kind"] == "fid":
        one, other = (_estimate(report, metric) for report in (b, a))
        return list(difference(one, other).interval) if one and other and one.replicates.parts == other.replicates.parts else None
    key = PER_SAMPLE.get(metric)
    columns = [[row.get(key) for row in report.get("samples", [])] for report in (a, b)]
    if key is None or len(columns[0]) < 2 or len(columns[0]) != len(columns[1]) or None in columns[0] + columns[1]:
        return None
    return mean_interval(torch.tensor(columns[1], dtype=torch.float64) - torch.tensor(columns[0], dtype=torch.float64))


def _estimate(report: dict[str, Any], metric: str) -> Estimate | None:
    stored = report.get("replicates", {}).get(metric)
    if stored is None:
        return None
    replicates = Replicates(tuple(stored["values"]), stored["fraction"], len(stored["values"]) - 1, stored["parts"])
    value = report["metrics"][metric]
    return Estimate(value, report["metrics"]["n"], (value, value), LEVEL, replicates)


def _verdict(kind: str, rows: list[dict[str, Any]]) -> str:
    row = next(row for row in rows if row["metric"] == DECIDES[kind])
    if row["interval"] is None:
        return f"no interval: these reports hold too little to say whether their {row['metric']} differs"
    low, high = row["interval"]
    around = f"B - A of {row['metric']} is {row['difference']:+.4g}, 95% {low:+.4g} to {high:+.4g}"
    return f"{around}: {'this N does not tell the two apart' if low <= 0 <= high else 'the two differ'}"


def _at(metrics: dict[str, Any], path: str) -> float | None:
    value: Any = metrics
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)
