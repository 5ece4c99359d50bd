"""Do all ranks hold the same bits? Hashes of every reference at every step, on real ranks: written to docs/results/exchange-states.json.

    python evals/exchange_states.py [--seeds 20] [--steps 50] [--limit-s SECONDS]

Every mode and codec, with residual order 2 (for int4 also 1 and 0); each seed is a request of its own. With a limit seeds are as many as there is
time for, and each row says how many. Half an hour without, on 2 cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "parallel"))

from ranks import run  # noqa: E402

MODES = [(2, "kv_gather"), (2, "ring"), (2, "ulysses"), (2, "displaced"), (2, "pipefusion"), (3, "kv_gather"), (3, "ulysses"), (4, "ulysses2+ring2")]
MODES += [(4, "cfg+kv_gather"), (4, "cfg+pipefusion")]
CODECS = [("int8", 2), ("int4", 2), ("int4", 1), ("int4", 0), ("int2", 2), ("int1", 2), ("lowrank-4", 2), ("topk-8", 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit-s", type=float)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/exchange-states.json")
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    pairs = [(ranks, mode, codec, order) for codec, order in CODECS for ranks, mode in MODES]
    seed_s = None  # of the slowest so far
    for at, (ranks, mode, codec, order) in enumerate(pairs):
        seeds = options.seeds
        if options.limit_s:
            left = (options.limit_s - (time.monotonic() - began)) / (len(pairs) - at)
            seeds = 1 if seed_s is None else max(1, min(options.seeds, int(left / seed_s)))
        started = time.monotonic()
        answers = run(ranks, "states", timeout_s=1800, mode=mode, codec=codec, order=order, seeds=seeds, steps=options.steps)
        assert all(one == answers[0] for one in answers)
        rows.append({"ranks": ranks, "mode": mode, "codec": codec, "order": order, "seeds": seeds, "steps": options.steps, **answers[0]})
        print(rows[-1], flush=True)
        took = (time.monotonic() - started) / seeds
        seed_s = took if seed_s is None else 0.7 * seed_s + 0.3 * took
        different = sum(row["different"] for row in rows)
        total = {"compared": sum(row["equal"] for row in rows) + different, "different": different}
        total["steps"] = sum(row["seeds"] * row["steps"] for row in rows)
        command = f"python evals/exchange_states.py --seeds {options.seeds} --steps {options.steps}"
        command += f" --limit-s {options.limit_s:g}" if options.limit_s else ""
        document = {"command": command, "what": __doc__.splitlines()[0], "total": total, "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    if different:
        raise SystemExit(f"{different} references differ between ranks")


if __name__ == "__main__":
    main()
