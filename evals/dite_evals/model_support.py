"""Whether dite carries a model class through its whole life: found, quantized, saved, loaded, dequantized."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dite
from dite.errors import DiteError
from dite.models.discovery import discover
from dite.quant.apply import quantized_layers
from dite_evals.every_transformer import small_model

RECIPES = ("w4a8", "w8a8")
WORKS = "works"


def support(cls: type[nn.Module]) -> dict[str, Any]:
    """`parameters, blocks, linears` and for each recipe "works" or why not; `not_built` where no small one can be built."""
    try:
        model = small_model(cls)
    except Exception as error:
        return {"not_built": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    row: dict[str, Any] = {"parameters": sum(one.numel() for one in model.parameters())}
    try:
        found = discover(model)
        row |= {"blocks": [f"{one.count} {one.class_name}" for one in found.blocks], "linears": len(found.linears)}
        dite.inspect(model)
    except DiteError as error:
        return row | dict.fromkeys(RECIPES, _reason(error))
    return row | {recipe: whole_life(copy.deepcopy(model), recipe) for recipe in RECIPES}


def whole_life(model: Any, recipe: str) -> str:
    """ "works", or what did not."""
    classes = {name: type(module) for name, module in model.named_modules()}
    try:
        dite.quantize(model, recipe, effort="fast")
        with tempfile.TemporaryDirectory() as folder:
            dite.save(model, Path(folder) / "q")
            again = dite.load(Path(folder) / "q", dtype="float32")
        weights = {name: layer.dequantize() for name, layer in quantized_layers(again).items()}
        if not quantized_layers(again) or not same_tensors(model, again):
            return "the model that was loaded is not the one that was saved"
        restored = again.dequantize()
        if quantized_layers(restored) or {name: type(module) for name, module in restored.named_modules()} != classes:
            return "dequantizing left something behind"
        if not all(torch.equal(restored.get_submodule(name).weight, weight) for name, weight in weights.items()):
            return "dequantizing gave other weights than the codes stand for"
    except DiteError as error:
        return _reason(error)
    except Exception as error:  # one class must not end the table
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return WORKS


def page(document: dict[str, Any]) -> str:
    """The table as Markdown."""
    diffusers = document["diffusers"]
    about = f"Every transformer class of diffusers {diffusers}, small and with random weights: inspected, quantized, saved, loaded bit for bit,"
    lines = [
        "# Model classes",
        "",
        f"{about}\ndequantized. {document['work']} of {document['classes']} work. Made by `{document['command']}`; the data is in",
        "[results/model-support.json](results/model-support.json).",
        "",
        "| class | blocks found | linears in them | " + " | ".join(RECIPES) + " |",
        "|---|---|---|" + "---|" * len(RECIPES),
    ]
    for row in document["rows"]:
        blocks = ", ".join(f"{block.replace(' ', ' × ', 1)}" for block in row.get("blocks", [])) or row.get("not_built", "")
        lines.append(f"| {row['class']} | {blocks} | {row.get('linears', '')} | " + " | ".join(row.get(recipe, "") for recipe in RECIPES) + " |")
    return "\n".join(lines) + "\n"


def same_tensors(model: nn.Module, other: nn.Module) -> bool:
    """Whether both hold the same names, dtypes and bits."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(ours[key].dtype == theirs[key].dtype and _equal(ours[key], theirs[key]) for key in ours)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _reason(error: DiteError) -> str:
    return f"{type(error).__name__}: {error.what}" + (f" ({error.why})" if error.why else "")
