"""FID of the built-in model over N and seeds, and whether it is the same number however it was drawn: as data.

    python evals/fid_repeatability.py --out docs/results/fid-repeatability.json [--work FOLDER] [--kills 10]
    python evals/fid_repeatability.py --only-equal --out docs/results/fid-interruptions.json

    sizes    N = 1000, 2000, 5000, 10000 of seeds 0, 1, 2: FID with its interval, both limits for N to infinity, and every other metric
    equal    N = 1000 of seed 0, drawn in shards of 1, 7 and 64, by 1, 2 and 3 ranks, and killed at random moments and gone on with: the hash of all
             features and every figure, to the last bit

Everything goes through the command line: `dite eval fid builtin:cifar10-dit --protocol cifar10-5k`. Samples are kept in --work, so that this resumes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dite_evals.figures import NAMES
from dite_evals.report import environment

MODEL = "builtin:cifar10-dit"
SIZES = (1000, 2000, 5000, 10000)
SEEDS = (0, 1, 2)
SMALL = 1000
DEADLINE_S = 900.0
WAYS = {
    "shards of 1": ("--batch-size", "1"),
    "shards of 7": ("--batch-size", "7"),
    "shards of 64": ("--batch-size", "64"),
    "features only": ("--features-only",),
    "2 ranks": ("--nproc", "2"),
    "3 ranks": ("--nproc", "3"),
}


def main() -> None:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sizes = []
    if not arguments.only_equal:
        sizes = [row(measure(arguments.work / f"seed{seed}", n, "--seed", seed), seed) for seed in SEEDS for n in SIZES]
    reference = measure(arguments.work / "alone", SMALL)
    equal = [{"how": how, "same": same(measure(arguments.work / how.replace(" ", "-"), SMALL, *flags), reference)} for how, flags in WAYS.items()]
    draw = random.Random(0)
    kills = [killed(arguments.work / f"killed-{index}", draw, reference) for index in range(arguments.kills)]
    document: dict[str, Any] = {
        "command": f"python evals/fid_repeatability.py {'--only-equal ' * arguments.only_equal}--out {arguments.out} --kills {arguments.kills}",
        "environment": environment(),
        "measures": shell(arguments.work / "r", SMALL)[3:],
        "sizes": sizes,
        "reference": row(reference, 0) | {"features_sha256": reference["features_sha256"]},
        "equal": equal,
        "kills": kills,
        "identical": sum(one["same"] for one in [*equal, *kills]),
        "trials": len(equal) + len(kills),
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


def row(metrics: dict[str, Any], seed: int) -> dict[str, Any]:
    """The figures of one run, without how long it took."""
    kept = {key: metrics[key] for name in NAMES if metrics[name] is not None for key in (name, "interval" if name == "fid" else f"{name}_interval")}
    return {"seed": seed, "n": metrics["n"]} | kept


def same(metrics: dict[str, Any], reference: dict[str, Any]) -> bool:
    return row(metrics, 0) == row(reference, 0) and metrics["features_sha256"] == reference["features_sha256"]


def shell(output: Path, n: int, *flags: Any) -> list[str]:
    command = [sys.executable, "-m", "dite", "eval", "fid", MODEL, "--protocol", "cifar10-5k", "--n", n, *flags, "-o", output, "--json"]
    return [str(part) for part in command]


def measure(output: Path, n: int, *flags: Any) -> dict[str, Any]:
    done = subprocess.run(shell(output, n, *flags), check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    print(f"{output.name}: N {n}", file=sys.stderr, flush=True)
    return dict(json.loads(done.stdout))


def killed(output: Path, draw: random.Random, reference: dict[str, Any]) -> dict[str, Any]:
    """Kill a run and its ranks once a random number of its 20 shards is there, go on with other ranks and other shards, and compare."""
    ranks, resumed, batch, after = draw.choice((1, 2)), draw.choice((1, 2, 3)), draw.choice((1, 7, 64)), draw.randint(1, 18)
    facts = {"ranks": ranks, "resumed_ranks": resumed, "resumed_shards": batch, "killed_after_shards": after}
    samples = output.with_name(f"{output.name}.samples")
    if not output.exists():
        process = subprocess.Popen(
            shell(output, SMALL, "--nproc", ranks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + DEADLINE_S
        while len(list(samples.glob("shard-*.safetensors"))) < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shards = len(list(samples.glob("shard-*.safetensors")))
    return facts | {"shards_kept": shards, "same": same(measure(output, SMALL, "--nproc", resumed, "--batch-size", batch), reference)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dite-fid-repeatability", help="where samples are kept")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only-equal", action="store_true", help="leave the sizes out, which take two thirds of the time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
