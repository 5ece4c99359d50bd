"""Does FID see what paired fidelity sees? Both of one model, quantized and exchanged in several ways, as data and as a picture.

    python evals/fid_and_fidelity.py --out docs/results/fid-and-fidelity.json [--work FOLDER] [--n 5000] [--pairs 128]

Each row: the relative error of the latents and PSNR against the same model at full precision (bf16, `--pairs` samples), and FID (`--n` samples) with
its difference from full precision's, both with 95% intervals; the difference is paired: both models drew the same seeds. All at 20 steps, guidance
1.5. Samples' features are kept in --work, so that this resumes.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import torch

import dite
from dite_evals.compare import compare_reports
from dite_evals.fidelity import mean_interval
from dite_evals.plots import log_ticks, number, ticks
from dite_evals.report import environment

MODEL = "builtin:cifar10-dit"
SETTINGS = {"steps": 20, "guidance": 1.5, "dtype": "bfloat16"}
RECIPES = ("w8a8", "w6a8", "w4a8", "w4a4")
CODECS = ("int4", "int2", "int1")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 400, 70, 50


def main() -> None:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(name, arguments) for name in ("full precision", *RECIPES, *CODECS)]
    document: dict[str, Any] = {
        "command": f"python evals/fid_and_fidelity.py --out {arguments.out} --n {arguments.n} --pairs {arguments.pairs}",
        "environment": environment(),
        "model": MODEL,
        "settings": SETTINGS | {"n": arguments.n, "pairs": arguments.pairs, "codecs": "2 ranks gathering, order 2, adaptive; simulated"},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    arguments.out.with_suffix(".svg").write_text(picture(rows[1:]), encoding="utf-8")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    home = arguments.work / name.replace(" ", "-")
    with model(name, arguments.work) as pipe:
        if not (home / "fid" / "report.json").exists():
            dite.evaluate(pipe, "cifar10-5k", n=arguments.n, output=home / "fid", features_only=True)
        if name != "full precision" and not (home / "fidelity" / "report.json").exists():
            baseline = dite.load(MODEL, dtype=SETTINGS["dtype"])
            dite.evaluate(pipe, "fidelity-128", baseline=baseline, n=arguments.pairs, output=home / "fidelity", **SETTINGS)
    found = json.loads((home / "fid" / "report.json").read_text())["metrics"]
    row: dict[str, Any] = {"model": name} | {key: found[key] for key in ("fid", "interval", "fid_corrected", "fid_corrected_interval", "n")}
    if name != "full precision":
        paired = json.loads((home / "fidelity" / "report.json").read_text())
        errors = torch.tensor([sample["latent_relative_error"] for sample in paired["samples"]], dtype=torch.float64)
        against = compare_reports(arguments.work / "full-precision" / "fid", home / "fid")["rows"][0]
        row |= {"fid_difference": against["difference"], "fid_difference_interval": against["interval"]}
        row |= {"latent_relative_error": errors.mean().item(), "latent_relative_error_interval": mean_interval(errors)}
        row |= {"psnr": paired["metrics"]["psnr"]["mean"], "psnr_interval": paired["metrics"]["psnr"]["interval"]}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


@contextmanager
def model(name: str, work: Path) -> Iterator[Any]:
    """The pipeline of a row."""
    if name in RECIPES:
        folder = work / f"{name}.model"
        if not folder.exists():
            pipe = dite.load(MODEL)
            dite.quantize(pipe, name)
            dite.save(pipe, folder)
        yield dite.load(folder, dtype=SETTINGS["dtype"])
        return
    pipe = dite.load(MODEL, dtype=SETTINGS["dtype"])
    if name not in CODECS:
        yield pipe
        return
    with dite.parallelize(pipe, 2, codec=name, simulate=True):
        yield pipe


def picture(rows: list[dict[str, Any]]) -> str:
    """A whole SVG file: the difference of FID against the error of the latents, a cross of two intervals for each model."""
    spans = [(row["latent_relative_error_interval"], row["fid_difference_interval"]) for row in rows]
    left, right = min(max(span[0][0], 1e-4) for span in spans) / 1.3, max(span[0][1] for span in spans) * 1.3
    low, high = min(0.0, *(span[1][0] for span in spans)), max(span[1][1] for span in spans)
    low, high = low - 0.08 * (high - low), high + 0.12 * (high - low)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * math.log(max(value, left) / left) / math.log(right / left)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 20) * (value - low) / (high - low)

    marks = f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#999" stroke-dasharray="4 3"/>'
    labels: list[tuple[float, float]] = []
    for row, (across, along) in zip(rows, spans, strict=True):
        at, up, ink = x(row["latent_relative_error"]), y(row["fid_difference"]), "#1f5fa8" if row["model"] in RECIPES else "#b3541e"
        marks += f'<g stroke="{ink}" fill="{ink}"><line x1="{at:.1f}" x2="{at:.1f}" y1="{y(along[0]):.1f}" y2="{y(along[1]):.1f}"/>'
        marks += f'<line x1="{x(across[0]):.1f}" x2="{x(across[1]):.1f}" y1="{up:.1f}" y2="{up:.1f}"/><circle cx="{at:.1f}" cy="{up:.1f}" r="3.5"/>'
        above = row["model"] in RECIPES
        label, step = (y(along[1]) - 6, -13) if above else (y(along[0]) + 16, 13)
        while any(abs(at - other) < 44 and abs(label - height) < 13 for other, height in labels):
            label += step
        labels.append((at, label))
        marks += f'<text x="{at:.1f}" y="{label:.1f}" text-anchor="middle" stroke="none">{escape(row["model"])}</text></g>'
    for value in log_ticks(left, right):
        marks += f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>'
    for value in ticks(low, high):
        marks += f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>'
    middle = (LEFT + WIDTH) / 2
    marks += f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">relative error of the latents, paired with full precision</text>'
    marks += f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">FID less that of full precision, paired</text>'
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return f'<svg {frame}><rect width="100%" height="100%" fill="white"/>{marks}</svg>\n'


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write; the picture goes beside it")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dite-fid-and-fidelity", help="where features are kept")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    main()
