"""`dp` against `evolution`: equal options, budget and sample-forwards, judged by paired fidelity that neither saw; as data.

    python evals/search_strategies.py --out docs/results/search-strategies.json [--model builtin:cifar10-dit] [--budget-bits 4.5]

`dp` runs first, with the forwards it wants; evolution gets as many, and then the 50,000 that a search may take at most. The paper's search takes
50 candidates × 10 generations × 800 images × 100 steps × 2 (guidance), 80 million; without guidance and with 55 steps, about 22.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import dite
from dite_evals.report import environment

FIDELITY = {"steps": 20, "guidance": 2.0, "dtype": "float32"}
MOST = 50_000


def main() -> None:
    arguments = parse()
    document: dict[str, Any] = {
        "command": f"python evals/search_strategies.py --out {arguments.out} --model {arguments.model} --budget-bits {arguments.budget_bits}",
        "environment": environment(),
        "configuration": {"model": arguments.model, "budget_bits": arguments.budget_bits, "fidelity": FIDELITY, "n": arguments.n},
        "rows": [],
    }
    first = measure("dp", MOST, arguments)
    for row in (first, *(measure("evolution", most, arguments) for most in (first["forwards"], MOST))):
        document["rows"].append(row)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)


def measure(strategy: str, most: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One search, and the fidelity of what it found."""
    pipe = dite.Pipeline.from_pretrained(arguments.model, dtype="float32")
    changes = [f"search.strategy={strategy}", f"search.max_forwards={most}", f"search.budget_bits={arguments.budget_bits}"]
    report = dite.quantize(pipe, "w4a8-mixed", overrides=changes)
    search = report.plan["search"]
    found = dite.evaluate(pipe, "fidelity-128", baseline=arguments.model, **FIDELITY | {"n": arguments.n})
    return {
        "strategy": strategy,
        "max_forwards": most,
        "forwards": search["forwards"],
        "search_seconds": search["seconds"],
        "seconds": round(report.seconds, 1),
        "bytes": report.plan["bytes"],
        "fitness": report.plan["error"],
        "latent_relative_error": found["latent_relative_error"],
        "psnr": found["psnr"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--budget-bits", type=float, default=4.5)
    parser.add_argument("--n", type=int, default=64, help="pairs of images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
