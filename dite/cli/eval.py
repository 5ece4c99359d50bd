"""`dite eval fidelity | fid | compare | stats`: image quality in numbers, with a report and a gate; and what an FID is measured against."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import dite
from dite.cli import options
from dite.cli.gate import Gate, check_gates, parse_gates
from dite.cli.output import Answer, progress
from dite.cli.sharing import placed
from dite.errors import OutputExists, UsageError
from dite.evaluation import FID_KEYS, FIDELITY_KEYS, open_extractor
from dite.outputs import check_writable
from dite.parallel.launch import start_ranks

app = typer.Typer(help="Measure image quality: paired with the original (fidelity), or against a data set (fid).", no_args_is_help=True)

Protocol = Annotated[str, typer.Option("--protocol", metavar="NAME|FILE", help="A protocol from `dite recipes ls --kind eval`, or a YAML file.")]
Count = Annotated[int | None, typer.Option("--n", help="Samples; the protocol's number unless given.", min=1, show_default=False)]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps; the protocol's unless given.", min=1, show_default=False)]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Scale of classifier-free guidance; the protocol's unless given.", min=0.0, show_default=False)
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the run; the protocol's unless given.", min=0, show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Write report.json, report.html and report.md there, over those of an earlier run; fid keeps its samples in DIR.samples.",
        show_default=False,
    ),
]
FailIf = Annotated[
    list[str] | None, typer.Option("--fail-if", metavar="EXPR", help="Exit with code 4 if this holds, as 'psnr.mean<30' or 'fid>12'. Repeatable.")
]


class Resize(StrEnum):
    """How an extractor brings images to its own size."""

    clean = "clean"
    legacy = "legacy"
    none = "none"


STATISTICS = (".safetensors", ".npz")


@app.command()
def fidelity(
    model: options.Model,
    baseline: Annotated[str, typer.Option("--baseline", metavar="BASE", help="The full-precision original: a folder, a hub id, or builtin:NAME.")],
    protocol: Protocol = "fidelity-128",
    set: options.SetProtocol = None,
    n: Count = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    output: Output = None,
    fail_if: FailIf = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Compare a model with its original on the same seeds: PSNR, SSIM, latent and per-step error."""
    gates = parse_gates(fail_if, FIDELITY_KEYS)
    changes = {"n": n, "steps": steps, "guidance": guidance, "seed": seed, "dtype": dtype and dtype.value}
    where = {"baseline": baseline, "device": device}
    return _measure("fidelity", model, protocol, set, changes, gates, no_progress, command=where, output=output, dry_run=dry_run, **where)


@app.command()
def fid(
    context: typer.Context,
    model: options.Model,
    protocol: Protocol,
    set: options.SetProtocol = None,
    n: Count = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="B", help="Samples a shard on disk; changes no result.", min=1, show_default=False)
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", metavar="N", help="Processes that draw a part of the samples each: the same bits.", min=1, max=1024, show_default=False
        ),
    ] = None,
    features_only: Annotated[
        bool, typer.Option("--features-only", help="Delete images once their features are stored, but for the first 100.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure with no more samples than features, too.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the samples of a run with other settings that are in the way.")] = False,
    output: Output = None,
    fail_if: FailIf = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer | int:
    """Fréchet distance to a protocol's reference statistics and whatever else they allow (KID, precision and recall, ...), with intervals.

    Interrupted runs with -o go on where they were. Also started by `accelerate launch -m dite eval fid ...` or torchrun, on several machines that
    share the output's folder.
    """
    gates = parse_gates(fail_if, FID_KEYS)
    changes = {"n": n, "steps": steps, "guidance": guidance, "seed": seed, "dtype": dtype and dtype.value}
    rank, degree, to_start = placed(nproc)
    if to_start and not dry_run:
        _check_protocol("fid", protocol, set, changes)
        return start_ranks(degree, context.obj)
    how = {
        "device": device,
        "batch_size": batch_size,
        "features_only": features_only,
        "force": force,
        "discard": discard,
        "output": output,
        "dry_run": dry_run,
    }
    answer = _measure("fid", model, protocol, set, changes, gates, no_progress, command={"device": device}, **how)
    return 0 if rank else answer  # rank 0 has the same figures, and says them


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A report.json, or the folder that holds it.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other one.", show_default=False)],
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Two reports side by side, with the interval of each difference over paired seeds. Refuses other protocols, N or extractors."""
    from dite_evals.compare import compare_reports

    comparison = compare_reports(first, second)
    lines = [_row(row) for row in comparison["rows"]]
    return Answer(comparison, "\n".join([f"{'':24} {'A':>12} {'B':>12} {'B - A':>12}  95% interval", *lines, comparison["verdict"]]).rstrip())


def _row(row: dict[str, Any]) -> str:
    interval = f"{row['interval'][0]:+.4g} to {row['interval'][1]:+.4g}" if row["interval"] else ""
    return f"{row['metric']:24} {row['a']:12.5g} {row['b']:12.5g} {row['difference']:+12.4g}  {interval}".rstrip()


@app.command()
def stats(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Images: a folder, parquet in Hugging Face's layout, an .npz. Or statistics: an .npz of ADM or clean-fid, a .safetensors of dite.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Statistics to write: .safetensors for dite, .npz for ADM's and clean-fid's tools.",
            show_default=False,
        ),
    ],
    extractor: Annotated[
        str | None,
        typer.Option(
            "--extractor",
            metavar="NAME|FOLDER",
            help="inception, dinov2 or clip (with --weights); or a folder or builtin:NAME with a classifier. For an import also the id of one.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="PATH", help="Inception's .safetensors, or the transformers folder of dinov2 or clip.", show_default=False),
    ] = None,
    resize: Annotated[
        Resize | None,
        typer.Option("--resize", help="How the extractor resizes; inception legacy and the others clean unless given.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", metavar="PX", help="Take the middle square of each image at this size first.", min=1, show_default=False),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Which split of a parquet folder.", show_default=False)] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", help="Images, evenly spaced over the source; all unless given. Of an import: how many it was.", min=2, show_default=False
        ),
    ] = None,
    keep_features: Annotated[
        int, typer.Option("--keep-features", metavar="K", help="Store the features of K images too, for KID, precision and recall.", min=0)
    ] = 0,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Reference statistics of a data set under one extractor: computed from images, imported, or exported."""
    start = time.perf_counter()
    _check_statistics_file(output, overwrite, keep_features)
    from dite.models.load import parse_device
    from dite_evals.collect import EXTRACTOR_ID, Wanted, collect, plan
    from dite_evals.statistics import write_statistics
    from dite_evals.statistics_npz import write_npz

    parse_device(device)
    named = extractor is None or (weights is None and EXTRACTOR_ID.fullmatch(extractor))
    chosen = extractor if named else open_extractor(extractor, weights, resize and resize.value)
    wanted = Wanted(split, n, image_size, keep_features)
    if dry_run:
        return _facts(plan(source, chosen, wanted) | {"output": str(output)})
    with progress(no_progress) as tick:
        statistics = collect(source, chosen, wanted, tick, device)
    (write_npz if output.suffix == ".npz" else write_statistics)(output, statistics)
    return _facts(statistics.facts() | {"output": str(output), "seconds": time.perf_counter() - start})


def _facts(document: dict[str, Any]) -> Answer:
    return Answer(document, "\n".join(f"{key:13}  {value}" for key, value in document.items()))


def _check_statistics_file(output: Path, overwrite: bool, keep_features: int) -> None:
    """Before any work: the file's kind is known and can hold what is asked, it may be written, and it replaces nothing unasked."""
    if output.suffix not in STATISTICS:
        raise UsageError(f"unknown kind of statistics {output.name}", f"known: {', '.join(STATISTICS)}", f"-o {output.stem or 'stats'}.safetensors")
    if output.suffix == ".npz" and keep_features:
        raise UsageError("an .npz keeps no features", f"{keep_features} are to be kept, and ADM's layout has no place for them", "use .safetensors")
    if output.exists() and not overwrite:
        raise OutputExists(f"{output} exists", "it may have taken hours", "use --overwrite, or another -o")
    check_writable(output.parent)


def _measure(
    kind: str,
    model: str,
    protocol: str,
    overrides: list[str] | None,
    changes: dict[str, Any],
    gates: list[Gate],
    no_progress: bool,
    *,
    command: dict[str, Any],
    **options: Any,
) -> Answer:
    _check_protocol(kind, protocol, overrides, changes)
    again = _again(kind, model, overrides or [], bool(options.get("force")), protocol=protocol, **command, **changes)
    with progress(no_progress) as tick:
        metrics = dite.evaluate(model, protocol, overrides=overrides or [], progress=tick, command=again, **options, **changes)
    return _planned(metrics) if options["dry_run"] else _answer(metrics, gates)


def _check_protocol(kind: str, protocol: str, overrides: list[str] | None, changes: dict[str, Any]) -> None:
    """Before torch and the models: a typing mistake is answered at once."""
    from dite_evals.protocols import load_protocol

    load_protocol(protocol, kind, overrides or [], **changes)


def _again(kind: str, model: str, overrides: list[str], forced: bool, **flags: Any) -> list[str]:
    """The command that measures the same again: without what changes no figure."""
    parts = [part for override in overrides for part in ("--set", override)]
    parts += ["--force"] if forced else []
    return ["dite", "eval", kind, model, *parts, *(part for key, value in flags.items() if value is not None for part in (f"--{key}", str(value)))]


def _planned(document: dict[str, Any]) -> Answer:
    settings = "\n".join(f"{key:12}  {value}" for key, value in document["protocol"].items() if value not in ("", []))
    total = f"{document['micro_batches']} micro-batches of {document['protocol']['steps']} steps; nothing was sampled or written"
    return Answer(document, f"{settings}\n{total}")


def _answer(metrics: dict[str, Any], gates: list[Gate]) -> Answer:
    from dite_evals.report import headline

    rows = headline(metrics)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += [f"{'report':{width}}  {metrics['report']['html']}"] if "report" in metrics else []
    return Answer(metrics, "\n".join(lines), check_gates(gates, metrics))
