"""Lie about every field of saved pipelines' configurations, and ask whether the loader believes it: as data.

    python evals/checkpoint_lies.py --out docs/results/checkpoint-lies.json

See dite_evals/checkpoint_lies.py. The pipelines are one of classes, and one of text with two CLIPs and a T5 that are quantized too. Lies that change
nothing are listed, each with its field. Ends with 1 if a lie was believed.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dite  # noqa: E402
from dite_evals.checkpoint_lies import Liar  # noqa: E402
from dite_evals.random_models import tiny_pipeline  # noqa: E402
from dite_evals.report import environment  # noqa: E402
from tests.text.pipelines import sd3  # noqa: E402

CLASSES = ["dite_manifest.json", "model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
PARTS = ["text_encoder/config.json", "text_encoder_3/config.json", "tokenizer/tokenizer_config.json", "tokenizer_3/tokenizer_config.json"]
TEXT = ["model_index.json", "transformer/config.json", *PARTS]
PIPELINES = {"of classes": (tiny_pipeline, CLASSES, {}), "of text": (sd3, TEXT, {"overrides": ["text_encoders.num_bits=8"]})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoint-lies.json"))
    arguments = parser.parse_args()
    counts: Counter = Counter()
    rows: list[dict] = []
    for kind, (build, files, options) in PIPELINES.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = build()
            dite.quantize(pipe, "w4a8", effort="fast", **options)
            liar = Liar(dite.save(pipe, Path(folder) / "saved"), Path(folder) / "q")
            for name, path, what, lie in liar.cases(files):
                outcome, why = liar.tell(name, path, lie)
                counts[kind, name, outcome] += 1
                if outcome != "refused":
                    row = {"pipeline": kind, "file": name, "field": ".".join(map(str, path)), "lie": what, "outcome": outcome}
                    rows.append(row | ({"why": why} if why else {}))
    totals: Counter = Counter()
    for (_, _, outcome), count in counts.items():
        totals[outcome] += count
    document = {
        "command": "python evals/checkpoint_lies.py --out docs/results/checkpoint-lies.json",
        "cases": sum(totals.values()),
        "outcomes": dict(totals),
        "files": [{"pipeline": kind, "file": name, "outcome": outcome, "cases": count} for (kind, name, outcome), count in sorted(counts.items())],
        "not_refused": rows,
        "environment": environment(),
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(totals))
    believed = [row for row in rows if row["outcome"] != "same"]
    sys.exit(f"{len(believed)} lies were believed, see {arguments.out}" if believed else 0)


if __name__ == "__main__":
    main()
