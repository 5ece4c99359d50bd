"""Quantization methods against each other at equal bits and groups, as data: bytes, latent error, PSNR, seconds.

    python evals/methods_table.py --out docs/results/methods.json [--model builtin:cifar10-dit] [--n 32] [--searched]

Every method quantizes the same layers from the same calibration inputs, recorded once at full precision; `seconds` counts that recording in, while
methods in one basis share its factorisations. A row is written as soon as it is
measured; an interrupted run goes on with the next one. `--markdown` prints the table. `--searched` adds the `dp` search, at the bytes of the paper's
GPTQ in groups of 128.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import dite
from dite.models.load import load_pipeline
from dite.models.planning import make_plan
from dite.ptq.calibrate import Calls, observe, record
from dite.ptq.calibrated import spread
from dite.ptq.rounding import Choices, round_layer
from dite.quant.apply import replace_
from dite.recipe import QuantRecipe, load_recipe
from dite.sampling import SampleSettings, class_ids, sample, sample_seed
from dite_evals.fidelity import PairedFidelity
from dite_evals.report import environment

RECIPES = ("w8a8", "w4a8", "w4a4")
GROUP_SIZES = (128, 64)
STEPS, GUIDANCE = 20, 2.0
PAPER = "gptq (paper)"
SEARCHED = "searched"
METHODS = {
    "nearest": Choices("none", "nearest"),
    PAPER: Choices("none", "gptq", ordered=False),
    "gptq": Choices("none", "gptq"),
    "gptq, shrunken ranges": Choices("none", "gptq", shrink=True),
    "hadamard": Choices("hadamard", "nearest"),
    "smooth": Choices("smooth", "nearest"),
    "lowrank": Choices("lowrank", "nearest"),
    "hadamard, gptq": Choices("hadamard", "gptq"),
    "hadamard, gptq, shrunken ranges": Choices("hadamard", "gptq", shrink=True),
    "smooth, gptq": Choices("smooth", "gptq"),
    "smooth+hadamard, gptq": Choices("smooth+hadamard", "gptq"),
    "lowrank, gptq": Choices("lowrank", "gptq"),
    "hadamard+lowrank, gptq": Choices("hadamard+lowrank", "gptq"),
    "chosen per layer": Choices("auto", "auto"),
}


def main() -> None:
    arguments = parse()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text())))
        return
    document = json.loads(arguments.out.read_text()) if arguments.out.exists() else start(arguments)
    if document["configuration"] != configuration(arguments):
        sys.exit(f"{arguments.out} was made with {document['configuration']}; choose another --out, or remove it")
    bench = Bench(arguments.model, arguments.n)
    wanted = [(recipe, size, method) for recipe in RECIPES for size in GROUP_SIZES for method in METHODS]
    wanted += [(recipe, None, SEARCHED) for recipe in ("w4a8", "w4a4")] if arguments.searched else []
    for recipe, size, method in wanted:
        if any((row["recipe"], row["group_size"], row["method"]) == (recipe, size, method) for row in document["rows"]):
            continue
        row = {"recipe": recipe, "group_size": size, "method": method}
        row |= bench.searched(recipe, document["rows"]) if method == SEARCHED else bench.measured(recipe, size, METHODS[method])
        document["rows"].append(row)
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(arguments.out)
        print(json.dumps(row), file=sys.stderr, flush=True)


class Bench:
    """A full-precision pipeline in float32, its samples, and what its linears are given."""

    def __init__(self, model: str, n: int):
        self.source = model
        self.pipe = load_pipeline(model, dtype="float32")
        self.transformer = self.pipe.transformer
        classes = class_ids(self.pipe)
        self.conditions, self.seeds = [classes[index % len(classes)] for index in range(n)], [sample_seed(0, index) for index in range(n)]
        self.originals = self.samples()
        plan, settings = make_plan(self.transformer, load_recipe("w4a8")), load_recipe("w4a8").calibration
        begin = time.monotonic()
        calls: Calls = record(self.pipe, {"": self.transformer}, spread(classes, settings.num_samples), settings)[""]
        self.inputs = observe(self.transformer, [layer.name for layer in plan.layers], calls)
        self.calibration_s = time.monotonic() - begin

    def samples(self) -> list:
        return list(sample(self.pipe, self.conditions, self.seeds, SampleSettings(STEPS, GUIDANCE), trajectory=True))

    def measured(self, recipe: str, size: int, choices: Choices) -> dict[str, Any]:
        """A row: every planned layer by one method."""
        plan = make_plan(self.transformer, sized(recipe, size))
        model = copy.deepcopy(self.transformer)
        begin, total = time.monotonic(), plan.other_bytes
        for layer in plan.layers:
            how = choices if layer.kind == "token" else replace(choices, transform="none")
            found = round_layer(model.get_submodule(layer.name), layer.scheme, self.inputs[layer.name], how, layer.name)
            total += weight_bytes_of(layer, found.layer)
            replace_(model, layer.name, found.layer)
        seconds = time.monotonic() - begin
        calibrated = choices.rounding != "nearest" or choices.transform != "none"
        return {"bytes": total, "seconds": round(seconds + self.calibration_s * calibrated, 1)} | self.fidelity(model)

    def searched(self, recipe: str, rows: list[dict]) -> dict[str, Any]:
        """A row: `dp` at the bytes of the paper's GPTQ."""
        budget = next(row["bytes"] for row in rows if (row["recipe"], row["group_size"], row["method"]) == (recipe, 128, PAPER))
        pipe = load_pipeline(self.source, dtype="float32")
        changes = ["search.strategy=dp", f"search.budget_bytes={budget}", "layers={}"]
        report = dite.quantize(pipe, recipe, overrides=changes)
        found = {"bytes": report.plan["bytes"], "seconds": round(report.seconds, 1), "forwards": report.plan["search"]["forwards"]}
        return found | self.fidelity(pipe.transformer)

    def fidelity(self, model: Any) -> dict[str, Any]:
        """PSNR and latent error of `model` in place of the transformer."""
        pairs = PairedFidelity()
        self.pipe.transformer = model
        try:
            for ours, theirs in zip(self.samples(), self.originals, strict=True):
                pairs.add(ours, theirs)
        finally:
            self.pipe.transformer = self.transformer
        found = pairs.metrics()
        return {"latent_relative_error": found["latent_relative_error"], "psnr": found["psnr"], "per_step_error": found["per_step_error"]}


def sized(recipe: str, size: int) -> QuantRecipe:
    """A recipe with other groups: conditioning layers keep theirs, of at most 64."""
    return load_recipe(recipe, [f"defaults.token.weight.group_size={size}", f"defaults.conditioning.weight.group_size={min(size, 64)}"])


def weight_bytes_of(layer: Any, quantized: Any) -> int:
    from dite.quant.plan import weight_bytes

    return weight_bytes(layer.in_features, layer.out_features, quantized.scheme)


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    command = f"python evals/methods_table.py --out {arguments.out} --model {arguments.model} --n {arguments.n} --searched"
    return {"command": command, "environment": environment(), "configuration": configuration(arguments), "rows": []}


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the numbers."""
    return {"model": arguments.model, "n": arguments.n, "steps": STEPS, "guidance": GUIDANCE, "dtype": "float32"}


def markdown(document: dict[str, Any]) -> str:
    """The table: a row a method, a column a recipe and group size; latent errors, and the bytes of low-rank parts where they differ."""
    keys = [(recipe, size) for recipe in RECIPES for size in GROUP_SIZES]
    cells = {(row["recipe"], row["group_size"], row["method"]): row for row in document["rows"]}
    lines = ["| method | " + " | ".join(f"{recipe} g{size}" for recipe, size in keys) + " |", "|---" * (1 + len(keys)) + "|"]
    for method in METHODS:
        found = [cells.get((*key, method)) for key in keys]
        lines.append(f"| {method} | " + " | ".join(f"{row['latent_relative_error']:.4f}" if row else "" for row in found) + " |")
    for recipe in RECIPES:
        row = cells.get((recipe, None, SEARCHED))
        if row:
            lines.append(f"| searched, {recipe}, bytes of {PAPER} g128 | " + f"{row['latent_relative_error']:.4f} | " + " | " * (len(keys) - 1))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--n", type=int, default=32, help="pairs of images")
    parser.add_argument("--searched", action="store_true", help="add the dp search")
    parser.add_argument("--markdown", action="store_true", help="print the table of what --out holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
