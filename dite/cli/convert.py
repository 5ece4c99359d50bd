"""`dite convert`: an upstream checkpoint, which is a pickle, as a folder or file that is none."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dite.cli import options
from dite.cli.output import Answer

Source = Annotated[Path, typer.Argument(metavar="SOURCE.pt", help="A checkpoint written by torch.save, as DiT-XL-2-256x256.pt.", show_default=False)]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER|FILE.safetensors", help="A model folder, or a plain state dict.", show_default=False),
]
Heads = Annotated[int | None, typer.Option("--heads", help="Attention heads, for a DiT of unusual width.", min=1, show_default=False)]
MaxBytes = Annotated[int, typer.Option("--max-bytes", help="Refuse a larger file.", min=1)]
MaxTensors = Annotated[int, typer.Option("--max-tensors", help="Refuse more tensors.", min=1)]
MaxMemory = Annotated[int | None, typer.Option("--max-memory", help="Bytes of memory for reading; 3 × the file + 8 GB.", min=1, show_default=False)]
MaxSeconds = Annotated[int, typer.Option("--max-seconds", help="Give up reading after so long.", min=1)]


def convert(
    source: Source,
    output: Output,
    heads: Heads = None,
    max_bytes: MaxBytes = 64 * 10**9,
    max_tensors: MaxTensors = 20_000,
    max_memory: MaxMemory = None,
    max_seconds: MaxSeconds = 1800,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Convert an upstream .pt checkpoint, read apart and within limits, to a diffusers folder or a safetensors file."""
    from dite.checkpoint.convert import Limits, convert

    document = convert(source, output, num_heads=heads, limits=Limits(max_bytes, max_tensors, max_memory, max_seconds))
    made = document["model_class"] or "a plain state dict"
    inside = f" (under {document['taken_from']})" if document["taken_from"] else ""
    return Answer(document, f"{escape(str(output))}: {made}, {document['tensors']} tensors{inside}\ntrusted: {document['trusts']}")
