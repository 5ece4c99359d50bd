"""Kill a search at random moments, resume it, and compare plans: as data.

    python evals/search_kills.py --out docs/results/search-kills.json [--model FOLDER] [--kills 10]

Each trial starts `dite quantize --search dp` in a process of its own, kills it (SIGKILL) at a random moment between its start and its end, resumes
it with --resume, and asks whether codes and plan equal those of a run that nobody killed. Without --model it searches a random one of 2 blocks:
whether a search repeats itself doesn't depend on what it searches.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dite_evals.report import environment

SETTINGS = {
    "calibration.num_samples": 8,
    "calibration.num_steps": 10,
    "calibration.num_calls": 10,
    "search.bits": "[4,8]",
    "search.group_sizes": "[64,null]",
    "search.max_forwards": 9000,
}


def main() -> None:
    arguments = parse()
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(build(Path(folder) / "model"))
        whole = Path(folder) / "whole"
        began = time.monotonic()
        if subprocess.run(command(model, whole), check=False, capture_output=True).returncode:
            sys.exit("the uninterrupted search failed")
        seconds = time.monotonic() - began
        for index in range(arguments.kills):
            rows.append(trial(model, Path(folder) / f"killed-{index}", whole, draw.uniform(0, seconds)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    document: dict[str, Any] = {
        "command": f"python evals/search_kills.py --out {arguments.out} --kills {arguments.kills} --seed {arguments.seed}",
        "environment": environment(),
        "settings": SETTINGS,
        "uninterrupted_seconds": round(seconds, 1),
        "identical": sum(row["identical"] for row in rows),
        "trials": len(rows),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


def build(folder: Path) -> Path:
    """A DiTPipeline with random weights: 2 blocks, width 48."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8}
    transformer = DiTTransformer2DModel(**shape, norm_num_groups=4)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, mid_block_add_attention=False)
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), id2label={0: "nothing"}).save_pretrained(folder)
    return folder


def command(model: str, output: Path, *more: str) -> list[str]:
    changes = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "dite", "quantize", model, "--recipe", "w4a8-mixed", "--budget-bits", "7", "-o", str(output), *changes, *more]


def trial(model: str, output: Path, whole: Path, after_s: float) -> dict[str, Any]:
    """Kill after `after_s` seconds, resume, compare."""
    process = subprocess.Popen(command(model, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    journal = output.with_name(output.name + ".journal")
    evaluations = len((journal / "fitness.jsonl").read_text().splitlines()) if (journal / "fitness.jsonl").exists() else 0
    finished = output.exists()
    if not finished:
        resume = ("--resume",) if journal.exists() else ()
        done = subprocess.run(command(model, output, *resume), check=False, capture_output=True, text=True)
        if done.returncode:
            return {"killed_after_s": round(after_s, 2), "identical": False, "error": done.stderr[-500:]}
    same = equal(*(folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in (output, whole)))
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (output, whole)]
    same &= all(plans[0][key] == plans[1][key] for key in ("layers", "error", "bytes", "evaluated", "frontier"))
    return {"killed_after_s": round(after_s, 2), "evaluations_kept": evaluations, "finished_before": finished, "identical": same}


def equal(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a pipeline's folder; a small random one unless given")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
