"""What modes, codecs and residual orders cost in image quality: paired fidelity against one device, the ranks simulated in one process, as data.

    python evals/exchange_quality.py --out docs/results/exchange-quality.json [--model builtin:cifar10-dit] [--steps 20,50] [--n 128] [--fid 5000]
    python evals/exchange_quality.py --out docs/results/exchange-quality.json --markdown

A gather decodes to the same values whatever the number of ranks, and a ring to those of a gather; their rows stand for any number. A row is written
as soon as it is measured; an interrupted run goes on with the next. `--fid` adds FID (20 steps, bf16) to the defaults and the extremes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import dite
from dite.sampling import Sample, SampleSettings, class_ids, sample, sample_seed
from dite_evals.fidelity import PairedFidelity
from dite_evals.protocols import balanced
from dite_evals.report import environment

GUIDANCE = 2.0
ORDERS = ((0, 0.0), (1, 0.0), (2, 0.5), (2, "adaptive"))
KEYS = ("mode", "codec", "order", "damping", "ranks", "steps")


def cases(steps: list[int]) -> list[dict[str, Any]]:
    """Every row, those that matter most first."""
    last = ORDERS[-1]
    found = [("kv_gather", "none", *last, 2), *(("displaced", "none", *last, ranks) for ranks in (2, 4))]
    found += [("kv_gather", name, *order, 2) for name in ("int4", "int2", "int1", "int8") for order in reversed(ORDERS)]
    found += [("pipefusion", name, *last, ranks) for name in ("none", "int4", "int2") for ranks in (2, 4)]
    found += [("ulysses", name, *last, ranks) for name in ("int4", "int2") for ranks in (2, 4)]
    found += [("kv_gather", name, *order, 2) for name in ("lowrank-8", "topk-16") for order in (ORDERS[0], ORDERS[1], last)]
    found += [("displaced", "int4", *last, 2)]
    return [dict(zip(KEYS, (*case, count), strict=True)) for count in steps for case in found]


def fid_cases() -> list[dict[str, Any]]:
    """The defaults and the extremes."""
    chosen = [("kv_gather", "int4", 2), ("displaced", "none", 4), ("kv_gather", "int1", 2)]
    return [dict(zip(KEYS, (mode, codec, *ORDERS[-1], ranks, 20), strict=True)) for mode, codec, ranks in chosen]


def main() -> None:
    arguments = parse()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text())))
        return
    document = json.loads(arguments.out.read_text()) if arguments.out.exists() else start(arguments)
    if document["configuration"] != configuration(arguments):
        sys.exit(f"{arguments.out} was made with {document['configuration']}; choose another --out, or remove it")
    pipe = dite.load(arguments.model, dtype="float32")
    baselines: dict[int, list[Sample]] = {}
    for case in cases(arguments.steps):
        if not any(all(row[key] == case[key] for key in KEYS) for row in document["rows"]):
            if case["steps"] not in baselines:
                baselines = {case["steps"]: list(samples(pipe, case["steps"], arguments.n))}
            document["rows"].append(case | measure(pipe, case, baselines[case["steps"]]))
            save(arguments.out, document)
    for case in fid_cases() if arguments.fid else ():
        row = next(row for row in document["rows"] if all(row[key] == case[key] for key in KEYS))
        if "fid" not in row:
            with handle(narrow := dite.load(arguments.model, dtype="bfloat16"), case):
                found = dite.evaluate(narrow, "cifar10-5k", n=arguments.fid)
            row["fid"] = {key: found[key] for key in ("fid", "n", "interval")}
            save(arguments.out, document)


def handle(pipe: Any, case: dict[str, Any]) -> Any:
    return dite.parallelize(pipe, case["ranks"], case["mode"], case["codec"], order=case["order"], damping=case["damping"], simulate=True)


def measure(pipe: Any, case: dict[str, Any], baseline: list[Sample]) -> dict[str, Any]:
    """Fidelity, and how long a packet is on average beside its values in the model's dtype."""
    pairs = PairedFidelity()
    with handle(pipe, case) as par:
        for ours, theirs in zip(samples(pipe, case["steps"], len(baseline)), baseline, strict=True):
            pairs.add(ours, theirs)
        stats = par.stats()
    found = pairs.metrics()
    row = {key: found[key] for key in ("n", "psnr", "ssim", "latent_relative_error")}
    row["bits_per_value"] = stats["bytes_sent"] / stats["bytes_raw"] * 32
    print(json.dumps(case | row), file=sys.stderr, flush=True)
    return row


def samples(pipe: Any, steps: int, n: int) -> Any:
    """The same classes and seeds for all."""
    seeds = [sample_seed(0, index) for index in range(n)]
    return sample(pipe, balanced(class_ids(pipe), n), seeds, SampleSettings(steps, GUIDANCE), trajectory=True)


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    steps = ",".join(map(str, arguments.steps))
    command = f"python evals/exchange_quality.py --out {arguments.out} --model {arguments.model} --steps {steps} --n {arguments.n}"
    command += f" --fid {arguments.fid}" if arguments.fid else ""
    return {"command": command, "environment": environment(), "configuration": configuration(arguments), "rows": []}


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"model": arguments.model, "n": arguments.n, "guidance": GUIDANCE, "dtype": "float32"}


def save(path: Path, document: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def markdown(document: dict[str, Any]) -> str:
    """A table, one line a row."""
    lines = ["| mode | codec | order | ranks | steps | bits a value | PSNR | latent error | FID |", "|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(document["rows"], key=lambda row: (row["steps"], row["mode"], row["codec"], row["order"], str(row["damping"]), row["ranks"])):
        order = f"2, {row['damping']}" if row["order"] == 2 else str(row["order"])
        numbers = f"{row['bits_per_value']:.2f} | {row['psnr']['mean']:.1f} dB | {row['latent_relative_error']:.4f}"
        fid = f"{row['fid']['fid']:.2f}" if "fid" in row else ""
        lines.append(f"| {row['mode']} | {row['codec']} | {order} | {row['ranks']} | {row['steps']} | {numbers} | {fid} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--steps", type=lambda text: [int(word) for word in text.split(",")], default=[20, 50])
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--fid", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="print the table of what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
