"""Every transformer class of the installed diffusers, small and with random weights, through dite: docs/results/model-support.json, docs/models.md.

    python evals/model_support.py [--out docs/results/model-support.json] [--only CLASS ...]

Inspected, quantized at W4A8 and W8A8, saved, verified and loaded again (every tensor bit for bit), and dequantized back into the class's own linears.
What is refused is listed with its reason.
"""

import argparse
import json
import sys
from pathlib import Path

from diffusers import __version__ as diffusers_version

from dite_evals.every_transformer import every_class
from dite_evals.model_support import RECIPES, page, support

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/model-support.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/models.md", help="the same as a table to read")
    parser.add_argument("--only", nargs="+", metavar="CLASS")
    options = parser.parse_args()
    rows = []
    for name, cls in every_class().items():
        if options.only is None or name in options.only:
            rows.append({"class": name} | support(cls))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    works = sum(all(row.get(recipe) == "works" for recipe in RECIPES) for row in rows)
    facts = {"command": "python evals/model_support.py", "diffusers": diffusers_version, "classes": len(rows), "work": works}
    options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    if options.only is None:
        options.page.write_text(page(facts | {"rows": rows}))
    print(f"{works} of {len(rows)} work: {options.out}")


if __name__ == "__main__":
    main()
