"""How many images a second a model draws: as it is in fp32 and bf16, compiled, and quantized, from class labels to pictures, as data.

    python evals/images_per_second.py --out docs/results/images-per-second.json [--model builtin:cifar10-dit] [--images 8] [--steps 20]

All variants share their rounds (dite_kernels.bench.timing): `ratio_to_baseline` is the median over rounds of fp32's time ÷ own time. Quantized
variants are rounded to nearest, in bf16: how well codes were chosen has no influence on time.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dite
from dite.sampling import SampleSettings, class_ids, sample
from dite_kernels.bench.document import write
from dite_kernels.bench.environment import environment
from dite_kernels.bench.timing import Budget, interleave, wall_clock

BASELINE = "float32"
GUIDANCE = 4.0


def main() -> None:
    arguments = parse()
    settings = SampleSettings(arguments.steps, GUIDANCE, arguments.images)
    calls = {name: drawing(pipe, settings) for name, pipe in variants(arguments.model)}
    for name, call in calls.items():  # the first images wait for compilers
        print(f"warming up {name}", file=sys.stderr, flush=True)
        call()
    timings = interleave(calls, BASELINE, Budget(arguments.rounds), wall_clock(torch.device("cpu")))
    rows = [
        {"variant": name, "images_per_second": arguments.images / timing.p50_us * 1e6, "us": timing.us, "ratio_to_baseline": timing.ratio}
        for name, timing in timings.items()
    ]
    how = {"model": arguments.model, "images": arguments.images, "steps": arguments.steps, "guidance": GUIDANCE, "rounds": arguments.rounds}
    command = shlex.join(["python", "evals/images_per_second.py", *sys.argv[1:]])
    write({"command": command, "environment": environment(), **how, "baseline": BASELINE, "rows": rows}, arguments.out)
    for row in rows:
        print(f"{row['variant']:20} {row['images_per_second']:8.2f} images/s  {row['ratio_to_baseline']:5.2f}", file=sys.stderr)


def variants(model: str) -> list[tuple[str, Any]]:
    """Pipelines by name; `float32` and `bfloat16` are the model as it is."""
    found = [(dtype, dite.Pipeline.from_pretrained(model, dtype=dtype)) for dtype in ("float32", "bfloat16")]
    compiled = dite.Pipeline.from_pretrained(model, dtype="bfloat16")
    compiled.pipe.transformer.compile()
    found.append(("bfloat16 compiled", compiled))
    for recipe in ("w4a8", "w8a8"):
        pipe = dite.Pipeline.from_pretrained(model, dtype="bfloat16")
        dite.quantize(pipe, recipe, effort="fast")
        found.append((recipe, pipe))
    return found


def drawing(pipe: Any, settings: SampleSettings) -> Callable[[], list]:
    """A call that draws one micro-batch."""
    classes = class_ids(pipe)
    conditions = [classes[index % len(classes)] for index in range(settings.micro_batch)]
    return lambda: list(sample(pipe, conditions, list(range(settings.micro_batch)), settings))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--images", type=int, default=8, help="drawn together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
