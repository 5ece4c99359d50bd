"""A thousand faults between ranks, and deaths of ranks: what every rank came to, written to docs/results/exchange-faults.json.

    python evals/exchange_faults.py [--faults 1000]

What arrives at one rank is dropped, sent twice, swapped with the next, altered in one bit, or replaced by what came a step or a request before.
A fault is `noticed` when its receiver raises a typed error; `silent` when a rank raises none and has another result. `finished` counts ranks that had
all they needed before the fault, and the right result. Seconds are from the fault to the last rank's error.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "parallel"))

from ranks import Ranks, run  # noqa: E402

MODES = [(2, "kv_gather", "int4"), (3, "kv_gather", "int1"), (3, "ring", "none"), (3, "ulysses", "int2"), (2, "displaced", "int4")]
MODES += [(3, "displaced", "none"), (2, "pipefusion", "int8"), (2, "cfg", "none"), (4, "cfg+ring", "int4"), (4, "ulysses2+ring2", "topk-8")]


def injected(ranks: int, mode: str, codec: str, count: int) -> dict:
    answers = run(ranks, "inject", timeout_s=1500, mode=mode, codec=codec, count=count, seed=ranks)
    errors, seconds, noticed, silent, finished = Counter(), [], Counter(), 0, 0
    for documents in zip(*(one["documents"] for one in answers), strict=True):
        victim = documents[documents[0]["victim"]]
        errors.update(one["error"] for one in documents if one["error"])
        noticed[victim["kind"]] += victim["error"] in ("ExchangeCorrupted", "RanksDisagree", "NonFiniteOutput")
        silent += any(one["error"] is None and not one["same"] for one in documents)
        finished += sum(one["same"] for one in documents)
        seconds.append(max(one["s"] for one in documents) - victim["altered_s"])
    row = {"ranks": ranks, "mode": mode, "codec": codec, "injected": count, "noticed": sum(noticed.values()), "silent": silent, "finished": finished}
    return row | {"by_kind": dict(noticed), "errors": dict(errors), "seconds_median": sorted(seconds)[count // 2], "seconds_most": max(seconds)}


def died(ranks: int, mode: str, how: str, timeout_s: float) -> dict:
    with Ranks(ranks, "dies", {"how": how, "mode": mode, "timeout_s": timeout_s}) as processes:
        survivors = [processes.answer(rank) for rank in range(ranks) if rank != 1]
    told = {"errors": sorted({one["error"] for one in survivors}), "seconds_most": max(one["after_s"] for one in survivors)}
    return {"ranks": ranks, "mode": mode, "how": how, "timeout_s": timeout_s, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/exchange-faults.json")
    options = parser.parse_args()
    rows, deaths = [], []
    for ranks, mode, codec in MODES:
        rows.append(injected(ranks, mode, codec, -(-options.faults // len(MODES))))
        print(rows[-1], flush=True)
    for how, timeout_s in (("killed", 20.0), ("fails", 20.0), ("stopped", 2.0)):
        for ranks, mode in ((3, "kv_gather"), (3, "ring"), (3, "ulysses"), (3, "displaced"), (2, "pipefusion"), (4, "cfg+ring")):
            deaths.append(died(ranks, mode, how, timeout_s))
            print(deaths[-1], flush=True)
    total = {key: sum(row[key] for row in rows) for key in ("injected", "noticed", "silent", "finished")}
    command = {"command": f"python evals/exchange_faults.py --faults {options.faults}"}
    command |= {"what": __doc__.splitlines()[0], "machine": "2 cores, shared with other work"}
    document = command | {"total": total, "injected": rows, "deaths": deaths}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(total)
    if total["noticed"] != total["injected"]:
        raise SystemExit("not every fault was noticed")


if __name__ == "__main__":
    main()
