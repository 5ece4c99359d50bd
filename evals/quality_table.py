"""Size against quality of the recipes, as they are and rounded to nearest, as data: bytes, paired fidelity, and FID for the named recipes.

    python evals/quality_table.py --out docs/results/quality.json [--model builtin:cifar10-dit] [--recipes "w4a8;w4a4, rounded"] [--n 128]

A row is written as soon as it is measured, and an interrupted run goes on with the next one; processes with different `--recipes` may share an
`--out`. `--markdown` prints the table that README shows.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import dite
from dite_evals.report import environment

ROUNDED = ", rounded"  # a recipe's name with this: effort fast, nothing calibrated
RECIPES = ("w8a8", "w8a8" + ROUNDED, "w6a8", "w6a8" + ROUNDED, "w4a8-mixed", "w4a8", "w4a8" + ROUNDED, "w4a4", "w4a4" + ROUNDED)
SEARCHED = "w4a8-mixed"  # chooses groups itself
GROUP_SIZES = (128, 64)
ORDER = [("full precision", None), *((recipe, size) for recipe in RECIPES for size in GROUP_SIZES if recipe != SEARCHED or size == GROUP_SIZES[0])]
FIDELITY = {"steps": 20, "guidance": 2.0, "dtype": "float32"}
FID_DTYPE = "bfloat16"


def main() -> None:
    arguments = parse()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text())))
        return
    document = read(arguments)
    if document["configuration"] != configuration(arguments):
        sys.exit(f"{arguments.out} was made with {document['configuration']}; choose another --out, or remove it")
    for key in [("full precision", None), *((recipe, size) for size in GROUP_SIZES for recipe in RECIPES)]:
        if key[0] not in arguments.recipes or key not in ORDER:
            continue
        row = next((row for row in read(arguments)["rows"] if name_of(row) == key), {"recipe": key[0], "group_size": key[1]})
        measure(row, arguments)
        document = read(arguments)  # another process may have added its rows meanwhile
        rows = {name_of(one): one for one in document["rows"]} | {key: row}
        document["rows"] = [rows[name] for name in ORDER if name in rows]
        write(arguments.out, document)
        print(json.dumps(row), file=sys.stderr, flush=True)


def read(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured so far, or an empty document."""
    return json.loads(arguments.out.read_text()) if arguments.out.exists() else start(arguments)


def name_of(row: dict[str, Any]) -> tuple[str, int | None]:
    return row["recipe"], row["group_size"]


def measure(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Fill what is missing in a row: size and fidelity, then FID where the recipe is a named one (groups of 128)."""
    named = row["group_size"] in (None, GROUP_SIZES[0])
    if "bytes" not in row:
        pipe, size = build(row, arguments.model, FIDELITY["dtype"])
        row |= size
        if row["group_size"]:
            found = dite.evaluate(pipe, "fidelity-128", baseline=arguments.model, **FIDELITY | {"n": arguments.n})
            row |= {key: found[key] for key in ("n", "psnr", "ssim", "latent_relative_error", "per_step_error")}
    if arguments.fid and named and "fid" not in row:
        pipe, _ = build(row, arguments.model, FID_DTYPE)
        found = dite.evaluate(pipe, "cifar10-5k", n=arguments.fid)
        row["fid"] = {key: found[key] for key in ("fid", "n", "interval", "fid_infinity", "extractor", "seconds")}


def build(row: dict[str, Any], model: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a row, and its size and time to quantize."""
    pipe = dite.Pipeline.from_pretrained(model, dtype=dtype)
    if row["group_size"] is None:
        size = dite.inspect(pipe).sizes["bf16"]
        return pipe, {"bytes": size, "ratio": 1.0}
    size = row["group_size"]
    overrides = [f"defaults.{kind}.weight.group_size={min(size, 64) if kind == 'conditioning' else size}" for kind in ("token", "conditioning")]
    changes = overrides if size != GROUP_SIZES[0] else []
    changes += ["effort=fast"] if row["recipe"].endswith(ROUNDED) else []
    recipe = row["recipe"].removesuffix(ROUNDED)
    if recipe == SEARCHED:
        return searched(model, dtype)
    stored = dite.quantize(dite.Pipeline.from_pretrained(model), recipe, overrides=changes)  # at the stored dtype: the size on disk
    dite.quantize(pipe, recipe, overrides=changes)
    return pipe, facts(stored)


@cache
def search(model: str) -> tuple[Path, Any]:
    """A folder with the searched model, and the report: one search serves every precision."""
    pipe = dite.Pipeline.from_pretrained(model)
    report = dite.quantize(pipe, SEARCHED)
    return dite.save(pipe, Path(tempfile.mkdtemp()) / SEARCHED), report


def searched(model: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    folder, report = search(model)
    return dite.load(folder, dtype=dtype), facts(report)


def facts(report: Any) -> dict[str, Any]:
    return {"bytes": report.bytes, "ratio": report.baseline_bytes / report.bytes, "seconds_to_quantize": round(report.seconds, 2)}


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """An empty document: what was run (all rows of it, however many processes shared them), where, and how."""
    command = f"python evals/quality_table.py --out {arguments.out} --model {arguments.model} --n {arguments.n} --fid {arguments.fid}"
    return {"command": command, "environment": environment(), "configuration": configuration(arguments), "rows": []}


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the numbers."""
    fidelity = {"protocol": "fidelity-128", "n": arguments.n, **FIDELITY}
    return {"model": arguments.model, "fidelity": fidelity, "fid": {"protocol": "cifar10-5k", "n": arguments.fid, "dtype": FID_DTYPE}}


def markdown(document: dict[str, Any]) -> str:
    """README's table: the recipes as they are named; other groups are in the data."""
    lines = ["| recipe | group | transformer | smaller | PSNR | latent error | FID-5k [95%] |", "|---|---|---|---|---|---|---|"]
    for row in document["rows"]:
        if row["group_size"] not in (None, GROUP_SIZES[0]):
            continue
        fid = row.get("fid")
        quality = [f"{row['psnr']['mean']:.1f} dB", f"{row['latent_relative_error']:.3f}"] if "psnr" in row else ["", ""]
        score = f"{fid['fid']:.2f} [{fid['interval'][0]:.2f}, {fid['interval'][1]:.2f}]" if fid else ""
        group = "searched" if row["recipe"] == SEARCHED else str(row["group_size"] or "")
        cells = [row["recipe"], group, f"{row['bytes'] / 1e6:.1f} MB", f"{row['ratio']:.2f}×", *quality, score]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write, or to go on with")
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--n", type=int, default=128, help="pairs for PSNR and latent error")
    parser.add_argument("--recipes", type=lambda text: text.split(";"), default=["full precision", *RECIPES], help="only these rows")
    parser.add_argument("--fid", type=int, default=5000, help="samples for FID; 0 leaves it out")
    parser.add_argument("--markdown", action="store_true", help="print the table of an existing --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
