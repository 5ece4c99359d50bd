"""How keys and values change from step to step, by step and layer, and what a byte budget spent by that measure is worth; as data and pictures.

    python evals/exchange_changes.py --out docs/results/exchange-changes.json [--model builtin:cifar10-dit] [--n 128]

The changes are those of a simulated gather (int8, order 2), at 20 and 50 steps. The budgets are the bytes that int1, int2 and int4 take for an image;
each is spent once evenly, by that codec, and once by `dite.parallel.budget.allocate` on the changes of other seeds than those measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import dite
from dite.parallel.budget import allocate
from dite.parallel.rates import SQUARED_ERRORS
from dite.parallel.schedule import Schedule
from dite.sampling import SampleSettings, class_ids, sample, sample_seed
from dite_evals.fidelity import PairedFidelity
from dite_evals.plots import heat_map
from dite_evals.protocols import balanced
from dite_evals.report import environment

GUIDANCE = 2.0
STEPS = (20, 50)
RECORDED = 16  # samples whose changes are recorded
CODECS = ("int8", "int4", "int2", "int1")


def main() -> None:
    arguments = parse()
    pipe = dite.load(arguments.model, dtype="float32")
    document: dict[str, Any] = {
        "command": f"python evals/exchange_changes.py --out {arguments.out} --model {arguments.model} --n {arguments.n}",
        "environment": environment(),
        "model": arguments.model,
        "guidance": GUIDANCE,
        "changes": {},
        "budgets": [],
    }
    for steps in STEPS:
        with dite.parallelize(pipe, 2, codec="int8", simulate=True) as par:
            list(draw(pipe, steps, RECORDED, seed=1))
            table, profile = par.changes(), par.profile()
        document["changes"][str(steps)] = table
        for name, label in (("change", "‖Δ‖ / ‖x‖"), ("correlation", "correlation of successive changes")):
            path = arguments.out.with_name(f"{arguments.out.stem}-{name}-{steps}.svg")
            path.write_text(heat_map(table[name], label, "layer", "step"), encoding="utf-8")
        baseline = list(draw(pipe, steps, arguments.n))
        errors = {name: SQUARED_ERRORS[2][name] for name in CODECS}
        for codec in ("int1", "int2", "int4"):
            even = allocate(profile, 2**62, {codec: errors[codec]})
            spent = allocate(profile, even.sent_bytes, errors)
            used = [spent.schedule.codec(step, layer) for step in range(1, steps) for layer in range(len(profile.shapes))]
            row = {"steps": steps, "codec": codec, "bytes": even.sent_bytes, "bytes_by_change": spent.sent_bytes}
            row |= {"evenly": fidelity(pipe, steps, baseline, Schedule.constant(codec)), "by_change": fidelity(pipe, steps, baseline, spent.schedule)}
            row["codecs_used"] = {name: used.count(name) / len(used) for name in CODECS if name in used}
            document["budgets"].append(row)
            arguments.out.write_text(json.dumps(document, indent=1) + "\n")
            print(json.dumps(row), flush=True)


def draw(pipe: Any, steps: int, n: int, seed: int = 0) -> Any:
    """Samples of all classes."""
    seeds = [sample_seed(seed, index) for index in range(n)]
    return sample(pipe, balanced(class_ids(pipe), n), seeds, SampleSettings(steps, GUIDANCE), trajectory=True)


def fidelity(pipe: Any, steps: int, baseline: list, schedule: Schedule) -> dict[str, Any]:
    """Against one device."""
    pairs = PairedFidelity()
    with dite.parallelize(pipe, 2, codec=schedule, simulate=True):
        for ours, theirs in zip(draw(pipe, steps, len(baseline)), baseline, strict=True):
            pairs.add(ours, theirs)
    found = pairs.metrics()
    return {key: found[key] for key in ("psnr", "latent_relative_error")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write; pictures go beside it")
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--n", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    main()
