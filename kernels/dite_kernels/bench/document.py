"""A bench's document on paper: JSON for machines, a table for people."""

import json
import os
from pathlib import Path
from typing import Any

HEADINGS = ("shape", "op", "backend", "scheme", "p20 µs", "p50 µs", "p80 µs", "ratio", "TFLOP/s", "GB/s")


def write(document: dict[str, Any], path: Path) -> None:
    """Renamed into place, so that no reader meets half a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def cells(row: dict[str, Any]) -> list[str]:
    """One row as people read it, under HEADINGS."""
    times = [f"{row['us'][name]:.1f}" for name in ("p20", "p50", "p80")]
    rates = [f"{row[name]:.2f}" if name in row else "" for name in ("tflop_per_s", "gb_per_s")]
    return ["×".join(map(str, row["shape"])), row["op"], row["backend"], scheme(row), *times, f"{row['ratio_to_baseline']:.2f}", *rates]


def scheme(row: dict[str, Any]) -> str:
    """Bits and granularity of a row in one word.

    >>> scheme({"weight_bits": 4, "activation_bits": 8, "group_size": 64, "activation_granularity": "group"})
    'w4a8 g64, per group'
    """
    bits = "bf16" if row["weight_bits"] == 16 else f"w{row['weight_bits']}a{row['activation_bits'] or 16}"
    group = f" g{row['group_size']}" if row["group_size"] else ""
    return f"{bits}{group}, per group" if row["activation_granularity"] == "group" else bits + group


def table(document: dict[str, Any]) -> str:
    """All rows in aligned columns, then the notes."""
    lines = [list(HEADINGS), *(cells(row) for row in document["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = [
        "  ".join(cell.ljust(width) if index < 4 else cell.rjust(width) for index, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    baselines = sorted({row["baseline"] for row in document["rows"]})
    return "\n".join([*text, f"ratio: to {', '.join(baselines)}; above 1 is faster", *(f"note: {note}" for note in document["notes"])])
