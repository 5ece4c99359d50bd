"""Lie about every field of a saved pipeline's configurations, and ask whether the loader believes it: as data.

    python evals/checkpoint_lies.py --out docs/results/checkpoint-lies.json

See dite_evals/checkpoint_lies.py. Lies that change nothing are listed, each with its field.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import dite
from dite_evals.checkpoint_lies import Liar
from dite_evals.random_models import tiny_pipeline
from dite_evals.report import environment

FILES = ["dite_manifest.json", "model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoint-lies.json"))
    arguments = parser.parse_args()
    counts: Counter = Counter()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        liar = Liar(pipeline(Path(folder) / "saved"), Path(folder) / "q")
        for name, path, what, lie in liar.cases(FILES):
            outcome, why = liar.tell(name, path, lie)
            counts[name, outcome] += 1
            if outcome != "refused":
                rows.append({"file": name, "field": ".".join(map(str, path)), "lie": what, "outcome": outcome} | ({"why": why} if why else {}))
    totals = {outcome: sum(count for (_, found), count in counts.items() if found == outcome) for outcome in {found for _, found in counts}}
    document = {
        "command": "python evals/checkpoint_lies.py --out docs/results/checkpoint-lies.json",
        "cases": sum(totals.values()),
        "outcomes": totals,
        "files": [{"file": name, "outcome": outcome, "cases": count} for (name, outcome), count in sorted(counts.items())],
        "not_refused": rows,
        "environment": environment(),
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(totals))


def pipeline(folder: Path) -> Path:
    """A small quantized pipeline, saved."""
    pipe = tiny_pipeline()
    dite.quantize(pipe, "w4a8", effort="fast")
    return dite.save(pipe, folder)


if __name__ == "__main__":
    main()
