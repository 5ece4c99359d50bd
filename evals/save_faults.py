"""Interrupt saving at every point, fill the disk at every point, and let runs collide: as data. See dite_evals/save_faults.py.

    python evals/save_faults.py --out docs/results/save-faults.json

As root on Linux, also on real disks (tmpfs) that are too small by so much.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import dite
from dite_evals.random_models import tiny_pipeline
from dite_evals.report import environment
from dite_evals.save_faults import contents, forked, full_at, killed_at, points_of, race

DISKS, RACES, RUNS = 30, 20, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("save-faults.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # forked processes have one
    old, new = pipeline("w8a8"), pipeline("w4a8")
    with tempfile.TemporaryDirectory() as folder:
        document = {
            "command": "python evals/save_faults.py --out docs/results/save-faults.json",
            "kills": kills(old, new, Path(folder) / "kills"),
            "disk_full": disk_full(old, new, Path(folder) / "full"),
            "small_disks": small_disks(new, Path(folder) / "disks"),
            "races": races(new, Path(folder) / "races"),
            "environment": environment(),
        }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    for key in ("kills", "disk_full", "small_disks", "races"):
        print(key, json.dumps({name: value for name, value in document[key].items() if name != "rows"}))


def pipeline(recipe: str) -> Any:
    """A small quantized pipeline."""
    pipe = tiny_pipeline()
    dite.quantize(pipe, recipe, effort="fast")
    return pipe


def kills(old: Any, new: Any, place: Path) -> dict[str, Any]:
    """Killed at every point of a first save, then of one that replaces a model; from the beginning again until there are enough."""
    rows, expected = [], {}
    for name, model in (("old", old), ("new", new)):
        dite.save(model, place / name)
        expected[name] = contents(place / name)
    for replacing in (False, True):
        counted = place / "counting"
        counted.mkdir()
        if replacing:
            shutil.copytree(place / "old", counted / "q")
        points = points_of(partial(dite.save, new, counted / "q", overwrite=replacing), counted)
        shutil.rmtree(counted)
        for point, what in enumerate(points):
            here = place / f"{replacing}-{point}"
            here.mkdir()
            if replacing:
                shutil.copytree(place / "old", here / "q")
            killed = killed_at(partial(dite.save, new, here / "q", overwrite=replacing), here, point)
            found = contents(here / "q")
            state = "old" if replacing and found == expected["old"] else "none" if not replacing and found is None else "torn"
            state = "new" if found == expected["new"] else state
            dite.save(new, here / "q", overwrite=True)  # what a killed run leaves is no obstacle
            tidy = contents(here / "q") == expected["new"] and [path.name for path in here.iterdir()] == ["q"]
            rows.append({"replacing": replacing, "point": what, "killed": killed, "found": state, "next_save_whole_and_tidy": tidy})
            shutil.rmtree(here)
    whole = sum(row["killed"] and row["found"] != "torn" and row["next_save_whole_and_tidy"] for row in rows)
    return {"trials": len(rows), "whole": whole, "bound": 3 / len(rows) if whole == len(rows) else None, "rows": rows}


def disk_full(old: Any, new: Any, place: Path) -> dict[str, Any]:
    """The disk is full from a point on, at as many points as a save has that need room."""
    dite.save(old, place / "old")
    before, rows = contents(place / "old"), []
    shutil.copytree(place / "old", place / "counting/q")
    points = points_of(lambda: dite.save(new, place / "counting/q", overwrite=True), place / "counting")
    for point in [index for index, what in enumerate(points) if what.startswith(("open", "os.mkdir", "fsync", "half"))]:
        here = place / str(point)
        here.mkdir()
        shutil.copytree(place / "old", here / "q")
        status, said = full_at(lambda here=here: dite.save(new, here / "q", overwrite=True), here, point)
        clear = status == 3 and "bytes are needed" in said
        rows.append({"point": points[point], "status": status, "clear": clear, "old_intact": contents(here / "q") == before, "said": said[:200]})
        tidy = [path.name for path in here.iterdir()]
        rows[-1]["tidy"] = tidy == ["q"]
        shutil.rmtree(here)
    good = sum((row["clear"] and row["old_intact"] and row["tidy"]) or (row["status"] == 0 and row["tidy"]) for row in rows)
    return {"trials": len(rows), "good": good, "bound": 3 / len(rows) if good == len(rows) else None, "rows": rows}


def small_disks(new: Any, place: Path) -> dict[str, Any]:
    """Real disks of ever less room, asked beforehand and (every other one) lied to about what is free."""
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False, capture_output=True).returncode:
        return {"trials": 0, "why": "no permission to mount"}
    subprocess.run(["umount", place], check=True)
    needed = sum(path.stat().st_size for path in dite.save(new, place / "measured").rglob("*") if path.is_file())
    shutil.rmtree(place / "measured")
    plenty = type("Usage", (), {"free": 10**15})()
    rows = []
    for index in range(DISKS):
        size = max(64 * 1024, int(needed * (index + 1) / (DISKS + 1)))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        try:
            lied = bool(index % 2)
            with patch("shutil.disk_usage", lambda _: plenty) if lied else nullcontext():
                status, said = forked(lambda: dite.save(new, place / "q"))
            left = [path.name for path in place.iterdir()]
            rows.append(
                {"disk_bytes": size, "free_unknown": lied, "status": status, "clear": status == 3 and "bytes are needed" in said, "left": left}
            )
        finally:
            subprocess.run(["umount", place], check=True)
    good = sum(row["clear"] and row["left"] == [] for row in rows)
    return {"trials": len(rows), "good": good, "bytes_of_the_model": needed, "rows": rows}


def races(new: Any, place: Path) -> dict[str, Any]:
    """Several runs save to one new folder at once: one wins, the others say why not, and the folder is whole."""
    place.mkdir()
    dite.save(new, place / "expected")
    expected, rows = contents(place / "expected"), []
    for index in range(RACES):
        here = place / str(index)
        here.mkdir()
        ended = race(new, here / "q", RUNS)
        winners = sum(status == 0 for status, _ in ended)
        told = all("has been writing it since" in said or "exists already" in said for status, said in ended if status)
        whole = contents(here / "q") == expected and [path.name for path in here.iterdir()] == ["q"]
        rows.append({"winners": winners, "others_told_why": told, "whole": whole, "in_use": sum("is in use" in said for _, said in ended)})
    good = sum(row["winners"] == 1 and row["others_told_why"] and row["whole"] for row in rows)
    return {"trials": len(rows), "runs_each": RUNS, "good": good, "bound": 3 / len(rows) if good == len(rows) else None, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
