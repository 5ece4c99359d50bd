"""Which families of models share their tokens out in which modes: tried on real ranks, written to docs/results/parallel-support.json.

    python evals/parallel_support.py

Every pair is run on small random models and compared with one device (synchronous modes) or with the simulation (stale modes); what is refused is
listed with its reason.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "parallel"))

from ranks import run  # noqa: E402
from samples import FAMILIES  # noqa: E402

MODES = {
    2: ["kv_gather", "ring", "ulysses", "displaced", "pipefusion", "cfg"],
    3: ["kv_gather", "ring", "ulysses", "displaced", "pipefusion"],
    4: [
        *("kv_gather", "ring", "ulysses", "displaced", "pipefusion", "ulysses2+ring2"),
        *("cfg+kv_gather", "cfg+ring", "cfg+ulysses", "cfg+displaced", "cfg+pipefusion"),
    ],
}
LIMIT = 1e-5


def row(family: str, mode: str, ranks: int, found: dict) -> dict:
    """One line of the table. Raises SystemExit where ranks and their oracle differ."""
    if "refused" in found:
        return {"family": family, "mode": mode, "ranks": ranks, "supported": False, "reason": found["refused"]}
    stale = "displaced" in mode or "pipefusion" in mode
    error = found["simulated"] if stale else found["error"]
    if not error < LIMIT:
        raise SystemExit(f"{family} {mode} on {ranks} ranks: relative difference {error:.1e}")
    return {"family": family, "mode": mode, "ranks": ranks, "supported": True, "equals": "simulation" if stale else "one device", "reason": ""}


def main() -> None:
    rows = []
    for ranks, modes in MODES.items():
        cases = [{"family": family, "mode": mode, "steps": 3, "probe": True} for family in FAMILIES for mode in modes]
        answers = run(ranks, "modes", timeout_s=1200, cases=cases)
        assert all([one.get("refused") for one in other] == [one.get("refused") for one in answers[0]] for other in answers)
        rows += [row(case["family"], case["mode"], ranks, found) for case, found in zip(cases, answers[0], strict=True)]
    path = ROOT / "docs/results/parallel-support.json"
    facts = {"relative_limit": LIMIT, "models": "2 blocks (FLUX 2 + 2), 3 heads, random weights"}
    path.write_text(json.dumps({"command": "python evals/parallel_support.py"} | facts | {"rows": rows}, indent=1) + "\n")
    print(f"{sum(one['supported'] for one in rows)} of {len(rows)} supported: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
