"""How much memory and time `dite quantize` takes for a model of DiT-XL/2's size: 750 M random parameters in bf16, read from
disk; with fewer `--layers` a slice of it.

    python evals/large_model.py --work FOLDER --out docs/results/large-model.json [--recipe w4a8] [--effort default] [--layers 28]

Size, memory and time don't depend on what the weights are, so random ones will do. The quantizing runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dite_evals.random_models import SIZES, random_dit
from dite_evals.report import environment

XL2 = SIZES["dit-xl-2"]


def main() -> None:
    arguments = parse()
    source, target = arguments.work / f"xl2-{arguments.layers}-bf16", arguments.work / f"xl2-{arguments.layers}-{arguments.recipe}"
    if not (source / "model_index.json").exists():
        build(arguments.layers).save_pretrained(source)
    command = ["quantize", str(source), "--recipe", arguments.recipe, "--effort", arguments.effort, "-o", str(target), "--overwrite", "--json"]
    answer = json.loads(subprocess.run([sys.executable, "-m", "dite", *command], check=True, capture_output=True, text=True).stdout)
    before, after = folder_bytes(source / "transformer"), folder_bytes(target / "transformer")
    flags = f"--out {arguments.out} --recipe {arguments.recipe} --effort {arguments.effort} --layers {arguments.layers}"
    document = {
        "command": f"python evals/large_model.py --work FOLDER {flags}",
        "environment": environment(),
        "model": {"class": "DiTTransformer2DModel", "parameters": parameters(arguments.layers)} | XL2 | {"num_layers": arguments.layers},
        "recipe": arguments.recipe,
        "effort": arguments.effort,
        "folder_bytes": {"bf16": before, "quantized": after, "ratio": after / before},
        "peak_memory_bytes": answer["peak_memory_bytes"],
        "peak_above_bf16_bytes": answer["peak_memory_bytes"] - before,
        "seconds": answer["seconds"],
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def build(num_layers: int) -> DiTPipeline:
    """A random pipeline in bf16."""
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).bfloat16()
    return DiTPipeline(random_dit(XL2, num_layers), vae, DDIMScheduler(clip_sample=False), id2label={0: "nothing"})


def parameters(num_layers: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiTTransformer2DModel(**XL2 | {"num_layers": num_layers}).parameters())


def folder_bytes(folder: Path) -> int:
    """All files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the models go: 2 GB")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--effort", default="fast", help="fast rounds; default samples 64 trajectories with the model first")
    parser.add_argument("--layers", type=int, default=28, help="blocks; time and memory of calibration grow in proportion")
    return parser.parse_args()


if __name__ == "__main__":
    main()
