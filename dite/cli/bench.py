"""`dite bench linear | forward | codec | exchange`: how fast quantized linears, forwards, codecs and parallel steps are here, as data."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from dite.cli import options
from dite.cli.output import Answer, megabytes, progress
from dite.errors import UnsupportedModel, UsageError
from dite.recipe import load_recipe

if TYPE_CHECKING:
    from dite_kernels.bench.timing import Budget

app = typer.Typer(
    help="Measure speed: quantized linears (linear), whole forwards of a transformer (forward), codecs of residuals (codec), or steps on several "
    "ranks over slow links (exchange).",
    no_args_is_help=True,
)


class Size(StrEnum):
    """Sizes that a random model can have."""

    dit_xl_2 = "dit-xl-2"


EXCHANGE_MODES = "kv_gather,ring,ulysses,displaced,pipefusion"
Backends = Annotated[str, typer.Option("--backends", metavar="NAME,...", help="Backends from `dite doctor`.")]
Rounds = Annotated[
    int | None, typer.Option("--rounds", help="Rounds to time, exactly; otherwise as many as fit into --seconds.", min=1, show_default=False)
]
Seconds = Annotated[
    float, typer.Option("--seconds", help="Measured time: for each shape of `linear`, for each codec of `codec`, for all of `forward`.", min=0.0)
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads of torch on the CPU; as torch has it unless given.", min=1, show_default=False)
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON document there, over an earlier one.", show_default=False)
]


@app.command()
def linear(
    shapes: Annotated[
        str | None, typer.Option("--shapes", metavar="MxKxN,...", help="Tokens × in × out features; DiT-XL/2's unless given.", show_default=False)
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            "--schemes", metavar="NAME,...", help="As w4a8, w8a8-g64, w8a8-channel, w4a8-group; these and more unless given.", show_default=False
        ),
    ] = None,
    backends: Backends = "",
    rounds: Rounds = None,
    seconds: Seconds = 20.0,
    threads: Threads = None,
    device: options.Device = "cpu",
    output: Output = None,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Time quantized linears of every backend, side by side with the fastest bf16 linear that torch has here."""
    from dite_kernels.bench import cases

    _check_output(output)
    flags = {"shapes": shapes or cases.DEFAULT_SHAPES, "schemes": schemes or cases.DEFAULT_SCHEMES, "backends": backends}
    try:
        for parse, text in ((cases.Shape.parse, flags["shapes"]), (cases.Scheme.parse, flags["schemes"])):
            [parse(word) for word in cases.names(text)]  # before torch is loaded
        from dite_kernels.bench.linear import Options, bench_linear, table

        chosen = Options.parse(**flags, budget=_budget(rounds, seconds, threads), device=_device(device))
        with progress(no_progress) as tick:
            document = bench_linear(chosen, progress=tick)
    except cases.UnknownCase as error:
        raise _refused("linear", error) from error
    again = {**flags, "rounds": rounds, "seconds": seconds, "threads": threads, "device": device}
    return _answer(document, _again(["linear"], again), output, table(document))


@app.command()
def forward(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A folder, a hub id, or builtin:NAME.", show_default=False)] = None,
    size: Annotated[Size | None, typer.Option("--size", help="Instead of MODEL: random weights of this size.", show_default=False)] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="With --size: tokens a picture, 256 unless given.", min=1, show_default=False)
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="With --size: so many blocks and not all.", min=2, show_default=False)] = None,
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="NAME,...", help="Recipes from `dite recipes ls`, or YAML files; rounded only.")
    ] = "w4a8,w8a8",
    backends: Backends = "auto",
    peers: Annotated[str, typer.Option("--peers", metavar="NAME,...", help="Other libraries, where installed: torchao, quanto, sdnq.")] = "",
    compiled: Annotated[bool, typer.Option("--compiled", help="Also time bf16, and peers made for it, under torch.compile.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="B", help="Samples in the forward.", min=1)] = 2,
    rounds: Rounds = None,
    seconds: Seconds = 60.0,
    threads: Threads = None,
    device: options.Device = "cpu",
    output: Output = None,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Time whole forwards of a transformer in bf16, quantized by recipes, and by other libraries, side by side."""
    _check_output(output)
    if (model is None) == (size is None):
        raise UsageError("one model is needed", "MODEL or --size, and not both", "for example dite bench forward --size dit-xl-2 --layers 4")
    if size is None and (tokens or layers):
        raise UsageError("--tokens and --layers are for --size", f"{model} has its own", "leave them out")
    chosen = [load_recipe(name, ["effort=fast"]) for name in _words(recipes)]
    from dite_evals.speed import Asked, batched, bench_forward

    asked = Asked(chosen, _words(backends), _words(peers), compiled, _budget(rounds, seconds, threads))
    asked.check()  # before a model is loaded
    where = _device(device)
    transformer = _random(size.value, tokens, layers, where) if size else _loaded(model, where)
    with progress(no_progress) as tick:
        document = bench_forward(transformer, batched(_inputs(transformer), batch_size), asked, progress=tick)
    words = ["forward", *([model] if model else []), *(["--compiled"] if compiled else [])]
    flags = {"size": size and size.value, "tokens": tokens, "layers": layers, "recipes": recipes, "backends": backends, "peers": peers}
    again = flags | {"batch-size": batch_size, "rounds": rounds, "seconds": seconds, "threads": threads, "device": device}
    document = {"model": model or size.value, "batch_size": batch_size} | document
    return _answer(document, _again(words, again), output, _table(document))


@app.command()
def codec(
    codecs: Annotated[
        str | None, typer.Option("--codecs", metavar="NAME,...", help="int8, int4, int2, int1; all unless given.", show_default=False)
    ] = None,
    backends: Annotated[
        str, typer.Option("--backends", metavar="NAME,...", help="reference, cpu or triton; all unless given.", show_default=False)
    ] = "",
    elements: Annotated[
        int | None,
        typer.Option(
            "--elements", metavar="N", help="Elements to compress, in whole rows of 1152; a million unless given, more on a card.", show_default=False
        ),
    ] = None,
    rounds: Rounds = None,
    seconds: Seconds = 20.0,
    threads: Threads = None,
    device: options.Device = "cpu",
    output: Output = None,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Time the codecs of residuals, both ways, side by side with a plain copy of the activations."""
    from dite_kernels.bench import cases

    _check_output(output)
    flags = {"codecs": codecs or cases.DEFAULT_CODECS, "backends": backends, "elements": elements}
    try:
        cases.codec_names(flags["codecs"])  # before torch is loaded
        from dite_kernels.bench.codec import Options, bench_codec, table

        chosen = Options.parse(**flags, budget=_budget(rounds, seconds, threads), device=_device(device))
        with progress(no_progress) as tick:
            document = bench_codec(chosen, progress=tick)
    except cases.UnknownCase as error:
        raise _refused("codec", error) from error
    again = {**flags, "rounds": rounds, "seconds": seconds, "threads": threads, "device": device}
    return _answer(document, _again(["codec"], again), output, table(document))


@app.command()
def exchange(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A folder, a hub id, or builtin:NAME.", show_default=False)] = None,
    size: Annotated[Size | None, typer.Option("--size", help="Instead of MODEL: random weights of this size.", show_default=False)] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="With --size: tokens a picture, 1024 unless given.", min=1, show_default=False)
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="With --size: so many blocks, 6 unless given.", min=2, show_default=False)] = None,
    nproc: Annotated[int, typer.Option("--nproc", metavar="N", help="Ranks, each a process of one thread.", min=2, max=64)] = 2,
    modes: Annotated[str, typer.Option("--modes", metavar="NAME,...", help="As dite.parallelize takes them.")] = EXCHANGE_MODES,
    codecs: Annotated[str, typer.Option("--codecs", metavar="NAME,...", help="none is raw, in bf16.")] = "none,int8,int4,int2,int1",
    links: Annotated[
        str, typer.Option("--links", metavar="NAME,...", help="unshaped, 1gbit, 300mbit, 100mbit; all but the first need root, ip and tc.")
    ] = "unshaped",
    steps: Annotated[int, typer.Option("--steps", help="Steps of a trajectory, the first of which is a keyframe.", min=2)] = 6,
    rounds: Annotated[int, typer.Option("--rounds", help="How often each candidate draws it.", min=1)] = 3,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="B", help="Samples in a step; 2 of a class-conditional model are both guidance branches.", min=1)
    ] = 1,
    output: Output = None,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Time steps of a transformer on several ranks by mode, codec and link, side by side with one device. Starts its ranks itself."""
    _check_output(output)
    if (model is None) == (size is None):
        raise UsageError("one model is needed", "MODEL or --size, and not both", "for example dite bench exchange builtin:cifar10-dit")
    if size is None and (tokens or layers):
        raise UsageError("--tokens and --layers are for --size", f"{model} has its own", "leave them out")
    from dite_evals.exchange_speed import Asked, bench_exchange

    chosen = model or {"size": size.value, "tokens": tokens or 1024, "layers": layers or 6}
    asked = Asked(chosen, nproc, _words(modes), _words(codecs), _words(links), steps, rounds, batch_size)
    asked.check()
    with progress(no_progress) as tick:
        document = bench_exchange(asked, progress=tick)
    document |= {"model_sha256": _digest(model) if model else None}
    flags = {"size": size and size.value, "tokens": tokens, "layers": layers, "nproc": nproc, "modes": modes, "codecs": codecs, "links": links}
    again = flags | {"steps": steps, "rounds": rounds, "batch-size": batch_size}
    return _answer(document, _again(["exchange", *([model] if model else [])], again), output, _exchange_table(document))


def _refused(bench: str, error: Exception) -> UsageError:
    what, _, why = str(error).partition("; ")
    return UsageError(what, why, f"`dite bench {bench} --help` lists what it takes")


def _random(size: str, tokens: int | None, layers: int | None, device: str) -> Any:
    from dite_evals.random_models import random_dit, size_of

    return random_dit(size_of(size, tokens or 256), layers).to(device)


def _loaded(model: str, device: str) -> Any:
    from dite.models.access import the_denoiser
    from dite.models.load import load_pipeline

    return the_denoiser(load_pipeline(model, dtype="bfloat16", device=device))


def _digest(model: str) -> str:
    """Which model the ranks loaded, as `dite report` asks for it."""
    from dite.models.digest import model_digest
    from dite.models.load import load_pipeline

    return model_digest(load_pipeline(model, dtype="bfloat16"))


def _inputs(transformer: Any) -> Any:
    from dite.models.families import example_inputs, known_families

    inputs = example_inputs(transformer)
    if inputs is None:
        reason = f"nothing is known about what {type(transformer).__name__} takes"
        raise UnsupportedModel(reason, f"a forward is timed for {', '.join(known_families())}")
    return inputs


def _budget(rounds: int | None, seconds: float, threads: int | None) -> Budget:
    import torch

    from dite_kernels.bench.timing import Budget

    if threads:
        torch.set_num_threads(threads)
    return Budget(rounds, seconds)


def _device(name: str) -> str:
    from dite.models.load import parse_device

    return str(parse_device(name))


def _check_output(output: Path | None) -> None:
    """Raise UsageError, before anything is measured, for a file that can't be written."""
    if output is None:
        return
    from dite.outputs import check_writable

    if output.is_dir():
        raise UsageError(f"{output} is a folder", "-o names the file that the JSON document goes to", f"for example -o {output / 'bench.json'}")
    check_writable(output.parent)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def _again(words: list[str], flags: dict[str, Any]) -> str:
    """The command that measures the same again."""
    given = [part for key, value in flags.items() if value not in (None, "") for part in (f"--{key}", str(value))]
    return shlex.join(["dite", "bench", *words, *given])


def _answer(document: dict[str, Any], command: str, output: Path | None, human: Any) -> Answer:
    document = {"command": command} | document
    if output is not None:
        from dite_kernels.bench.document import write

        write(document, output)
    return Answer(document, human)


def _table(document: dict[str, Any]) -> Group:
    """A forward's rows: what ran, how long it took, what it holds."""
    table = Table(
        "variant", "backend", "p20 ms", "p50 ms", "p80 ms", "ratio", "weights", "in memory", "peak", "output error", box=None, padding=(0, 2, 0, 0)
    )
    for row in document["rows"]:
        times = [f"{row['us'][name] / 1e3:.1f}" for name in ("p20", "p50", "p80")]
        peak = "" if row["peak_memory_bytes"] is None else megabytes(row["peak_memory_bytes"])
        sizes = [megabytes(row["weight_bytes"]), megabytes(row["held_bytes"]), peak]
        shown = [f"{row['ratio_to_baseline']:.2f}", *sizes, f"{row['output_relative_error']:.3f}"]
        backend = row["backend"] if row["backend"] != row["name"] else ""
        table.add_row(*map(escape, (row["name"], backend, *times, *shown)))
    baseline = f"ratio: to {document['rows'][0]['baseline']}; above 1 is faster"
    return Group(table, escape(baseline), *(escape(f"note: {note}") for note in document["notes"]))


def _exchange_table(document: dict[str, Any]) -> Group:
    """Rows by link, the fastest first."""
    table = Table(
        "link", "mode", "codec", "ms a step", "keyframe ms", "× one device", "× best raw", "kB a step", "exposed ms", "hidden ms", "predicted ms",
        "latent error", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    order = {name: place for place, name in enumerate(document["configuration"]["links"])}
    for row in sorted(document["rows"], key=lambda row: (order[row["link"]], row["seconds_per_step"])):
        ms = [f"{1e3 * row[name]:.1f}" for name in ("seconds_per_step", "keyframe_seconds")]
        ratios = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio_to_one_device", "ratio_to_best_raw_synchronous")]
        more = [f"{row['bytes_per_step'] / 1e3:.1f}", *(f"{1e3 * row[name]:.1f}" for name in ("exposed_seconds", "hidden_seconds"))]
        predicted = f"{1e3 * row['predicted_seconds']:.1f}" if "predicted_seconds" in row else ""
        table.add_row(row["link"], row["mode"], row["codec"], *ms, *ratios, *more, predicted, f"{row['latent_relative_error']:.2g}")
    legend = "× one device, × best raw: how many times as fast as one device, and as the best of kv_gather, ring and ulysses without a codec"
    return Group(table, legend)
