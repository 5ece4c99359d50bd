"""Faults injected into a running server: what it goes through, and what its clients see of it, written to docs/results/serve-faults.json.

    python evals/serve_faults.py --out docs/results/serve-faults.json [--full | --quick] [--only NAME ...] [--resume]

Every row starts a server of its own, with one thread a rank, and tells how often a fault was injected, how often the server failed, the figures of
its goal, and whether that was met. *Lost* is an accepted request that doesn't end in exactly one well-formed reply. Where nothing failed in n trials,
the rate of failures is at most 3/n (95%). The file is written after each row; rows that aren't run stay as they are. A full run takes one to three
hours, a quick one ten minutes. Exit code 1 if a row misses its goal. Times depend on what else the machine does: see `load_average`, and
`longest_stall_s` of the clients themselves.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "evals"), str(ROOT / "kernels")]

from dite_evals.serve_faults import ROWS  # noqa: E402
from dite_kernels.bench.document import write  # noqa: E402
from dite_kernels.bench.environment import environment  # noqa: E402


def main() -> None:
    options = parse()
    extent = "full" if options.full else "quick"
    command = f"python evals/serve_faults.py --{extent} --out docs/results/serve-faults.json"
    document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    rows: dict[str, dict[str, Any]] = document.get("rows", {})
    missed = []
    for name in options.only or ROWS:
        count = getattr(ROWS[name], extent)
        if not (options.resume and (rows.get(name) or {}).items() >= {"count": count, "model": options.model, "ok": True}.items()):
            print(f"{name} ({count}) ...", flush=True)
            rows[name] = ROWS[name].run(count, options.model) | {"command": f"{command} --only {name}"}
            rows = {known: rows[known] for known in ROWS if known in rows}
            write({"command": command, "what": __doc__.splitlines()[0], "environment": environment(), "rows": rows}, options.out)
        print(f"{name}: {'ok' if rows[name]['ok'] else 'MISSED'}  {json.dumps(rows[name], ensure_ascii=False)}", flush=True)
        missed += [] if rows[name]["ok"] else [name]
    if missed:
        raise SystemExit(f"missed their goals: {', '.join(missed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="the counts that results are quoted with")
    extent.add_argument("--quick", action="store_true", help="a few of each (the default)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ROWS), help=f"rows: {', '.join(ROWS)}")
    parser.add_argument(
        "--resume", action="store_true", help="keep rows that the file has already, if they met their goals with this count and model"
    )
    parser.add_argument("--model", default="builtin:cifar10-dit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
