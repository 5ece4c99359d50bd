"""Spoil a saved model many times over and load it: as data. See dite_evals/checkpoint_fuzz.py for what counts as a failure.

    python evals/checkpoint_fuzz.py --cases 200000 --out docs/results/checkpoint-fuzz.json
    python evals/checkpoint_fuzz.py --subject text --cases 10000 --deep 1 --out docs/results/checkpoint-fuzz-text.json

The subject is a bare transformer, or a pipeline with a T5 that is quantized too, and its tokenizer.

Cases run in processes of their own, some thousands each, so that a crash is counted and ends nothing else; what is done is kept in FILE.partial, and
an interrupted run goes on from there. Case n is the same whenever it is run: `--first n --cases 1` repeats it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dite_evals.report import environment

CHUNK = 2_000
DEEP = 0.1  # the share of cases that digests don't stop
TMPFS = Path("/dev/shm")
ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = {  # what builds them, in a process that ends
    "model": """
import sys
from pathlib import Path
from dite_evals.checkpoint_fuzz import small_model
small_model(Path(sys.argv[1]))
""",
    "text": """
import sys
import dite
sys.path.insert(0, sys.argv[2])
from tests.text.pipelines import pixart
pipe = pixart()
dite.quantize(pipe, "w4a8", effort="fast", overrides=["text_encoders.num_bits=8"])
dite.save(pipe, sys.argv[1])
""",
}


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return work(arguments)
    partial = arguments.out.with_suffix(".partial")
    done = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    with tempfile.TemporaryDirectory(dir=TMPFS if TMPFS.is_dir() else None) as folder:
        saved = Path(folder) / "saved"
        subprocess.run([sys.executable, "-c", SUBJECTS[arguments.subject], str(saved), str(ROOT)], check=True, capture_output=True)
        for first in range(arguments.first, arguments.first + arguments.cases, CHUNK):
            if any(row["first"] == first for row in done):
                continue
            size = min(CHUNK, arguments.first + arguments.cases - first)
            done.append(chunk(saved, first, size, arguments.deep))
            with open(partial, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
            print(json.dumps({key: done[-1][key] for key in ("first", "cases", "seconds", "crash", "failures")}), file=sys.stderr, flush=True)
    document = {"subject": arguments.subject} | summary(done) | {"deep_share": arguments.deep, "environment": environment()}
    flags = f"--subject {arguments.subject} --cases {arguments.cases} --deep {arguments.deep:g}"
    document["command"] = f"python evals/checkpoint_fuzz.py {flags} --out {arguments.out}"
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    partial.unlink(missing_ok=True)
    sys.exit(f"{len(document['failures'])} failures, see {arguments.out}" if document["failures"] else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="model")
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--deep", type=float, default=DEEP, help="share of cases with a new manifest, or none")
    parser.add_argument("--out", type=Path, default=Path("checkpoint-fuzz.json"))
    parser.add_argument("--worker", type=Path, metavar="SAVED", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(arguments: argparse.Namespace) -> None:
    """Run one chunk in this process and print what came of it."""
    from dite_evals.checkpoint_fuzz import Subject

    with tempfile.TemporaryDirectory(dir=arguments.worker.parent) as folder:
        found = Subject(arguments.worker, Path(folder) / "q").run(range(arguments.first, arguments.first + arguments.cases), arguments.deep)
    print(json.dumps(found.to_dict()))


def chunk(saved: Path, first: int, cases: int, deep: float) -> dict:
    """One chunk in a process of its own; `crash` is how it ended if it didn't end well."""
    command = [sys.executable, __file__, "--worker", str(saved), "--first", str(first), "--cases", str(cases), "--deep", str(deep)]
    began = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"first": first, "cases": cases, "crash": None, "rows": [], "failures": [], "slowest_s": 0.0}
    if ended.returncode:
        row["crash"] = f"exit status {ended.returncode}: {ended.stderr[-500:]}"
    else:
        row |= json.loads(ended.stdout.splitlines()[-1])
    return row | {"seconds": round(time.monotonic() - began, 1)}


def summary(done: list[dict]) -> dict:
    """Counts over all chunks; where nothing failed, the rate is below 3/n with 95% confidence (the rule of three)."""
    counts: Counter = Counter()
    for row in (row for one in done for row in one["rows"]):
        counts[row["seal"], row["mutation"], row["outcome"]] += row["cases"]
    outcomes: Counter = Counter()
    for (_, _, outcome), count in counts.items():
        outcomes[outcome] += count
    failures = [failure for one in done for failure in one["failures"]]
    crashes = [{"first": one["first"], "crash": one["crash"]} for one in done if one["crash"]]
    cases = sum(outcomes.values())
    return {
        "cases": cases,
        "outcomes": dict(outcomes),
        "crashes": len(crashes),
        "hangs": outcomes["hang"],
        "other_exceptions": outcomes["other exception"],
        "silently_wrong": outcomes["silently wrong"],
        "bound": None if failures or crashes else 3 / cases,
        "slowest_s": max(one["slowest_s"] for one in done),
        "seconds": sum(one["seconds"] for one in done),
        "failures": failures + crashes,
        "rows": [{"seal": seal, "mutation": kind, "outcome": outcome, "cases": count} for (seal, kind, outcome), count in sorted(counts.items())],
    }


if __name__ == "__main__":
    main()
