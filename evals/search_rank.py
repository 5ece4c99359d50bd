"""Does the search's fitness rank plans as FID does? Random plans, measured by both, as data.

    python evals/search_rank.py --out docs/results/search-rank.json [--model builtin:cifar10-dit] [--plans 16] [--fid 2000]

Each plan gives every layer random bits and groups, weights rounded to nearest, 8-bit activations (4-bit in every fourth plan); plans differ in how
often they choose 4 bits, so that they spread over sizes. A row is written as soon as it is measured; an interrupted run goes on with the next one.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import dite
from dite.ptq.fitness import Trajectories
from dite_evals.report import environment

FID_STEPS = 10
CONDITIONS = [0, 1, 2, 3, 5, 6, 7, 8]
FIT = {"num_steps": 8, "guidance": 4.0, "seed": 0}  # as the search does


def main() -> None:
    arguments = parse()
    document = json.loads(arguments.out.read_text()) if arguments.out.exists() else start(arguments)
    for index in range(len(document["rows"]), arguments.plans):
        pipe = dite.Pipeline.from_pretrained(arguments.model, dtype="float32")
        fitness = Trajectories(pipe.pipe, CONDITIONS, **FIT)
        report = dite.quantize(pipe, random_recipe(pipe, index))
        row: dict[str, Any] = {"plan": index, "bytes": report.bf16_bytes, "error": fitness()}
        pipe = dite.Pipeline.from_pretrained(arguments.model, dtype="bfloat16")
        dite.quantize(pipe, random_recipe(pipe, index))
        found = dite.evaluate(pipe, "cifar10-5k", n=arguments.fid, steps=FID_STEPS)
        row |= {"fid": found["fid"], "interval": found["interval"], "n": found["n"]}
        document["rows"].append(row)
        document["spearman"] = spearman([one["error"] for one in document["rows"]], [one["fid"] for one in document["rows"]])
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
        print(json.dumps(row), document["spearman"], file=sys.stderr, flush=True)


def random_recipe(pipe: Any, index: int) -> dict[str, Any]:
    """Plan number `index`: the same for every precision the model is loaded in."""
    draw = random.Random(index)
    share = draw.random()
    activation = {"num_bits": 4 if index % 4 == 3 else 8, "granularity": "group" if index % 4 == 3 else "token"}
    layers = {}
    for linear in dite.inspect(pipe).to_dict()["linears"]:
        bits = 4 if draw.random() < share else draw.choice([6, 8])
        layers[linear["name"]] = {"weight": {"num_bits": bits, "group_size": draw.choice([32, 64, 128, None])}}
    token = {"weight": {"num_bits": 8}, "activation": activation}
    return {"name": f"random-{index}", "defaults": {"token": token, "conditioning": {"weight": {"num_bits": 8}}}, "layers": layers}


def spearman(first: list[float], second: list[float]) -> float | None:
    """Rank correlation; None for fewer than three pairs. Ties don't occur among measured numbers."""
    if len(first) < 3:
        return None
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    command = f"python evals/search_rank.py --out {arguments.out} --model {arguments.model} --plans {arguments.plans} --fid {arguments.fid}"
    return {"command": command, "environment": environment(), "fitness": FIT, "fid_steps": FID_STEPS, "rows": []}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--fid", type=int, default=2000, help="samples of each FID")
    return parser.parse_args()


if __name__ == "__main__":
    main()
