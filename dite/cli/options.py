"""The options that commands share, each spelled and explained once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DType(StrEnum):
    """Precisions a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Effort(StrEnum):
    """How far a recipe's `auto` goes."""

    fast = "fast"
    default = "default"
    high = "high"


class Strategy(StrEnum):
    """How bits, groups and transforms are shared out over the layers."""

    none = "none"
    dp = "dp"
    evolution = "evolution"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or builtin:NAME.", show_default=False)]
Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A recipe from `dite recipes ls`, or a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, as defaults.token.weight.group_size=64. Repeatable."),
]
SetProtocol = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the protocol, as micro_batch=10. Repeatable.")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of an earlier run.")]
TextEncoders = Annotated[
    int | None,
    typer.Option("--text-encoders", metavar="4|6|8", help="Round the text encoders' weights to so many bits, too.", show_default=False),
]
Precision = Annotated[DType | None, typer.Option("--dtype", help="Load the model in this precision; as stored unless given.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the first image; the next ones count up from it.", min=0, max=2**32 - 1)]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)]
Guidance = Annotated[float, typer.Option("--guidance", help="Scale of classifier-free guidance; 1 switches it off.", min=0.0)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Draw no progress bar (automatic off a terminal).")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error, and what the libraries say.")]
EffortLevel = Annotated[
    Effort | None,
    typer.Option(
        "--effort",
        help="fast: rounding only, seconds. default: calibrates, and chooses rounding and transform for each layer; half a minute for the "
        "built-in model, three hours for 750 M parameters on one core. high: more transforms, layer after layer; 5 times that.",
        show_default=False,
    ),
]
SearchStrategy = Annotated[
    Strategy | None,
    typer.Option(
        "--search", help="Share bits, groups and transforms out over the layers within a budget (minutes for the built-in model).", show_default=False
    ),
]
BudgetBytes = Annotated[
    int | None,
    typer.Option(
        "--budget-bytes", help="Most bytes of transformer weights on disk, what is not quantized counted in bf16.", min=1, show_default=False
    ),
]
BudgetBits = Annotated[
    float | None, typer.Option("--budget-bits", help="Most bits a quantized weight on average, scales included.", min=0.0, show_default=False)
]
BudgetTime = Annotated[
    float | None,
    typer.Option(
        "--budget-time",
        metavar="MS",
        help="Most milliseconds of the quantized layers in one batch of 8 with guidance, measured here.",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same model, recipe and output.")]
Nproc = Annotated[
    int | None,
    typer.Option("--nproc", help="Ranks to start and to share each picture out over; under torchrun, those it started.", min=1, show_default=False),
]
Mode = Annotated[
    str, typer.Option("--mode", help="How ranks share: kv_gather, ring, ulysses, displaced, pipefusion, cfg, a product as cfg+ring, or auto.")
]
Codec = Annotated[
    str, typer.Option("--codec", help="How exchanges are compressed: none, int8, int4, int2, int1, lowrank-R, topk-K, or a schedule's JSON file.")
]
Order = Annotated[
    int, typer.Option("--order", help="What a codec is given: 0 values, 1 their change, 2 their change against a prediction.", min=0, max=2)
]
