"""`dite generate`: pictures from a model, each with what is needed to make it again; beside another model's, if asked."""

from __future__ import annotations

import json as jsonlib
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dite
from dite.cli import options
from dite.cli.conditions import Condition, conditions
from dite.cli.output import Answer, note, progress
from dite.cli.sharing import Sharing
from dite.errors import OutputExists
from dite.outputs import check_writable

if TYPE_CHECKING:
    import torch

COMPARED = 16  # columns of compare.png; more are unreadable
METADATA = "metadata.json"


@dataclass(frozen=True)
class Job:
    """One `dite generate`, whatever model draws it: `--compare` runs the same job on two."""

    wanted: list[Condition]
    seeds: list[int]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Drawn:
    """The pictures of one model, uint8 [N, 3, H, W], and how long they took."""

    images: torch.Tensor
    dtype: str
    seconds: float
    seconds_per_step: float


def generate(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    class_: Annotated[list[str] | None, typer.Option("--class", metavar="NAME|ID", help="A class to draw. Repeatable; pictures take turns.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A text to draw, where the model reads text. Repeatable.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", "--count", help="How many pictures; one of each class or prompt given, or 8.", min=1, show_default=False)
    ] = None,
    seed: options.Seed = 0,
    steps: options.Steps = 50,
    guidance: options.Guidance = 4.0,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="BASE", help="Draw the same pictures with BASE too, and write compare.png.")
    ] = None,
    nproc: options.Nproc = None,
    mode: options.Mode = "kv_gather",
    codec: options.Codec = "int4",
    order: options.Order = 2,
    device: options.Device = "cpu",
    dtype: options.Precision = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer | int:
    """Draw pictures: single PNGs, a grid, and with --compare both models side by side."""
    check_folder(output, overwrite)
    sharing = Sharing.of(nproc, mode, codec, order)
    if sharing.to_start:
        return sharing.start(context.obj)
    from dite.models.load import load_pipeline

    precision = dtype and dtype.value
    pipe = load_pipeline(model, dtype=precision, device=device)
    wanted = conditions(pipe, class_ or [], prompt or [], count)
    job = Job(wanted, [seed + index for index in range(len(wanted))], steps, guidance)
    names = [f"{index:04}-{condition.slug}-seed{one}.png" for index, (condition, one) in enumerate(zip(job.wanted, job.seeds, strict=True))]
    if dry_run:
        return Answer(
            {"dry_run": True, "images": [str(output / name) for name in names]} | _facts(job), "\n".join(str(output / name) for name in names)
        )
    with progress(no_progress or sharing.rank > 0) as tick:
        with sharing.share(pipe) as exchanged:
            drawn = draw(pipe, job, tick, model)
        if sharing.rank:
            return 0  # rank 0 has the same pictures, and writes them
        measured = _identity(pipe, model, context.obj) if exchanged else {}
        del pipe  # two large models need not fit side by side
        base = draw(load_pipeline(compare, dtype=precision, device=device), job, tick, compare) if compare else None
    rows = {f"this: {model}": drawn} if base is None else {f"base: {compare}": base, f"this: {model}": drawn}
    written = write(output, names, describe(job, model, drawn), rows)
    note(f"{len(names)} pictures in {drawn.seconds:.1f} s, {drawn.seconds_per_step:.3f} s a step")
    document = {"images": [str(output / name) for name in names], "compare": written.get("compare"), "grid": written["grid"]} | _facts(job)
    document |= {"seconds": drawn.seconds, "seconds_per_step": drawn.seconds_per_step, "exchange": exchanged or None} | measured
    return Answer(document, "\n".join(written.values()))


def _identity(pipe: Any, model: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What an exchange was measured on, as `dite report` asks for it."""
    from dite.models.digest import dtype_name, model_digest

    return {"model": model, "dtype": dtype_name(pipe), "model_sha256": model_digest(pipe), "command": shlex.join(["dite", *arguments])}


def draw(pipe, job: Job, tick, title: str) -> Drawn:
    """Run the job on one model."""
    import torch

    from dite.sampling import SampleSettings, sample

    settings = SampleSettings(num_steps=job.steps, guidance=job.guidance)
    start = time.perf_counter()
    samples = sample(pipe, [condition.value for condition in job.wanted], job.seeds, settings, progress=lambda done, total: tick(title, done, total))
    images = torch.stack([one.image.cpu() for one in samples])
    seconds = time.perf_counter() - start
    batches = -(-len(images) // settings.micro_batch)
    return Drawn(images, str(pipe.transformer.dtype).removeprefix("torch."), seconds, seconds / (batches * job.steps))


def describe(job: Job, model: str, drawn: Drawn) -> list[dict[str, Any]]:
    """For each picture, what is needed to make it again: its index too, since a sample's row in its micro-batch decides the last bits."""
    shared = {"model": model, "steps": job.steps, "guidance": job.guidance, "dtype": drawn.dtype, "version": dite.__version__}
    return [
        ({"class": one.value, "class_name": one.name} if isinstance(one.value, int) else {"prompt": one.value})
        | {"seed": seed, "index": index}
        | shared
        for index, (one, seed) in enumerate(zip(job.wanted, job.seeds, strict=True))
    ]


def write(folder: Path, names: list[str], metadata: list[dict], rows: dict[str, Drawn]) -> dict[str, str]:
    """All files of one run, ours being the last of `rows`; returns the sheets to look at.

    Pictures of an earlier run go, so that the folder tells one story.
    """
    from dite.pictures import difference, grid, labelled_rows, to_png, visible_scale

    *others, ours = (drawn.images for drawn in rows.values())
    folder.mkdir(parents=True, exist_ok=True)
    for old in _pictures_in(folder):
        old.unlink()
    for name, image, facts in zip(names, ours, metadata, strict=True):
        (folder / name).write_bytes(to_png(image, facts))
    scale = visible_scale(ours.shape[-2])
    sheets = {"grid": grid(ours, columns=math.ceil(math.sqrt(len(names))), scale=scale)}
    if others:
        shown = {label: drawn.images[:COMPARED] for label, drawn in rows.items()}
        sheets["compare"] = labelled_rows(shown | {"8x difference": difference(ours[:COMPARED], others[0][:COMPARED])}, scale)
    for name, sheet in sheets.items():
        (folder / f"{name}.png").write_bytes(to_png(sheet))
    listed = [{"file": name} | facts for name, facts in zip(names, metadata, strict=True)]
    (folder / METADATA).write_text(jsonlib.dumps({"images": listed}, indent=2) + "\n", encoding="utf-8")
    return {name: str(folder / f"{name}.png") for name in sheets}


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless `overwrite`: then our pictures in it are replaced, and other files left alone."""
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise OutputExists(f"{folder} is not empty", "pictures are not written over others without being told", "use --overwrite, or another -o")


def _pictures_in(folder: Path) -> list[Path]:
    """What an earlier run wrote here, and nothing else."""
    return [
        *folder.glob("[0-9][0-9][0-9][0-9]-*-seed*.png"),
        *(folder / name for name in ("grid.png", "compare.png", METADATA) if (folder / name).exists()),
    ]


def _facts(job: Job) -> dict[str, Any]:
    return {"seeds": job.seeds, "class_labels": [condition.value for condition in job.wanted], "steps": job.steps, "guidance": job.guidance}
