"""Train the built-in model: autoencoder, classifier, diffusion model; then export the folder that ships as `builtin:cifar10-dit`.

    python recipes/cifar10_dit/train.py --data DATA --out RUN [--preset cpu|gpu|smoke] [--stages vae,classifier,dit,export,card] [--set dit.epochs=80]

Interrupt it when you like: the same command goes on from the last checkpoint; beside each it draws `samples.png`. The stage `card` writes the
model card again, once `dite eval fid RUN/cifar10-dit --protocol cifar10-5k -o RUN/fid` has measured the samples. On a shared CPU, and on several
cards, start it by `torchrun --nproc-per-node 2 recipes/cifar10_dit/train.py …`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import classifier
import dit
import export
import grids
import torch
import torch.distributed as dist
import vae
import yaml
from data import Split, load_split
from diffusers import DiTPipeline
from loop import Run, StageSettings, fit, load_average
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from dite_evals.classifier import SmallClassifier

HERE = Path(__file__).parent
PREVIEW_STEPS = 20
STAGES = ("vae", "classifier", "dit", "export")
CARD = "card"


class Shape(BaseModel):
    """The diffusion model's; the defaults are the built-in model's. Patch 1 makes 64 tokens of a latent, patch 2 makes 16."""

    model_config = ConfigDict(extra="forbid")
    patch_size: int = 2
    num_layers: int = 10
    num_heads: int = 4


class Settings(BaseModel):
    """A preset: the model's shape, and one block a stage."""

    model_config = ConfigDict(extra="forbid")
    seed: int
    model: Shape
    vae: StageSettings
    classifier: StageSettings
    dit: StageSettings


def main() -> None:
    arguments = parse()
    settings = resolve(arguments.preset, arguments.set)
    torch.manual_seed(settings.seed)
    device = torch.device(arguments.device)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
        device = device if device.type == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    run = Run(folder=arguments.out, name=arguments.name, device=device, seed=settings.seed, compile=arguments.compile)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "settings.json").write_text(json.dumps(settings.model_dump(), indent=1))
    train = _limit(load_split(arguments.data, "train"), arguments.limit)
    for stage in arguments.stages:
        if stage == "vae":
            train_vae(train, settings, run)
        elif stage == "classifier":
            train_classifier(train, settings, run)
        elif stage == "dit":
            train_dit(train, settings, run)
        elif dist.is_initialized() and dist.get_rank() > 0:
            continue
        elif stage == CARD:
            print(export.write_card(run.folder / run.name))
        else:
            test = _limit(load_split(arguments.data, "test"), arguments.limit)
            print(export.export(train, test, run, arguments.preset, load_vae(run, train), dit.build(**settings.model.model_dump())))


def train_vae(train: Split, settings: Settings, run: Run) -> None:
    """Stage 1. Leaves `vae/checkpoint.safetensors`."""
    model = vae.build().to(run.device)
    seen = train.images[: grids.PER_CLASS]

    def preview(path: Path) -> None:
        grids.draw_pairs(seen, vae.decode(model, vae.encode(model, seen, run.device), run.device), path)

    fit("vae", model, vae.make_loss(model, train.images, run.device), len(train.images), settings.vae, run, preview)


def train_classifier(train: Split, settings: Settings, run: Run) -> None:
    """Stage 2. Leaves `classifier/checkpoint.safetensors`."""
    model = SmallClassifier(len(train.names)).to(run.device)
    loss = classifier.make_loss(model, train.images, train.labels, run.device, run.compile)
    fit("classifier", model, loss, len(train.images), settings.classifier, run)


def train_dit(train: Split, settings: Settings, run: Run) -> None:
    """Stage 3, on latents encoded once, with their mirror images. Leaves `dit/checkpoint.safetensors`."""
    latents = load_latents(train, run)
    torch.manual_seed(settings.seed)
    model = dit.build(**settings.model.model_dump()).to(run.device)
    loss = dit.make_loss(model, latents, train.labels, run.device, run.compile)
    autoencoder = load_vae(run, train)

    def preview(path: Path) -> None:
        pipe = DiTPipeline(model, autoencoder, dit.scheduler(), id2label=dict(enumerate(train.names)))
        grids.draw_samples(pipe, len(train.names), path, PREVIEW_STEPS)

    fit("dit", model, loss, len(train.images), settings.dit, run, preview)


def load_latents(train: Split, run: Run) -> torch.Tensor:
    """Latents of the images, then of their mirror images, fp16 [2·N, 4, 8, 8]; encoded once, by all ranks, and kept beside the autoencoder."""
    path = run.folder / "vae" / "latents.safetensors"
    if not path.exists():
        autoencoder = load_vae(run, train)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        images = torch.cat([train.images, train.images.flip(-1)])
        mine = vae.encode(autoencoder, images[rank::world_size], run.device).half()
        latents = torch.zeros(len(images), *mine.shape[1:])
        latents[rank::world_size] = mine.float()
        if world_size > 1:
            dist.all_reduce(latents)
        if rank == 0:
            save_file({"latents": latents.half()}, path)
        if world_size > 1:
            dist.barrier()
    return load_file(path)["latents"]


def load_vae(run: Run, train: Split):
    """The trained autoencoder with standardised latents."""
    model = vae.build().to(run.device)
    load_average(run.folder / "vae" / "checkpoint.safetensors", model)
    vae.standardize_(model, vae.encode(model, train.images[:10000], run.device))
    return model


def resolve(preset: str, overrides: list[str]) -> Settings:
    """A preset with `stage.key=value` overrides applied."""
    values = yaml.safe_load((HERE / "presets.yaml").read_text())[preset]
    for override in overrides:
        path, _, value = override.partition("=")
        *parents, key = path.split(".")
        block = values
        for parent in parents:
            block = block[parent]
        block[key] = yaml.safe_load(value)
    return Settings.model_validate(values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the exported model")
    parser.add_argument("--name", default=export.NAME, help="name of the exported model")
    parser.add_argument("--preset", default="cpu", choices=("cpu", "gpu", "smoke"))
    parser.add_argument("--stages", default=",".join(STAGES), type=lambda text: text.split(","), help="comma-separated, in order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a preset's value, e.g. dit.epochs=80")
    parser.add_argument("--limit", type=int, default=None, help="use only the first N images of each split")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the diffusion model")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - {*STAGES, CARD}
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; use {', '.join((*STAGES, CARD))}")
    return arguments


def _limit(split: Split, count: int | None) -> Split:
    return Split(split.images[:count], split.labels[:count], split.names)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
