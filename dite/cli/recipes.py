"""`dite recipes`: the built-in recipes, listed or printed."""

from enum import StrEnum
from typing import Annotated

import typer

from dite.cli import options
from dite.cli.output import Answer
from dite.errors import RecipeError, did_you_mean
from dite.recipe import read_yaml, recipe_folder, recipe_names


class Kind(StrEnum):
    """Folders of built-in recipes."""

    quant = "quant"
    eval = "eval"


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe as YAML; all are listed without it.", show_default=False)
    ] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="Recipes for `dite quantize`, or protocols for `dite eval`.")] = Kind.quant,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """List the built-in recipes, or print one: its output is a valid recipe file."""
    if name is not None:
        text = _text(kind, name)
        return Answer({"name": name, "kind": kind.value, "recipe": read_yaml(text, name)}, text)
    found = [_summary(kind, name) for name in recipe_names(kind)]
    width = max((len(entry["name"]) for entry in found), default=0)
    return Answer({"recipes": found}, "\n".join(f"{entry['name']:{width}}  {entry['description']}".rstrip() for entry in found))


def _summary(kind: Kind, name: str) -> dict[str, str]:
    return {"name": name, "kind": kind.value, "description": read_yaml(_text(kind, name), name).get("description", "")}


def _text(kind: Kind, name: str) -> str:
    known = recipe_names(kind)
    if name not in known:
        other = next((one for one in Kind if name in recipe_names(one)), None)
        hint = f"`dite recipes {name} --kind {other}` prints it" if other else did_you_mean(name, known) or f"`dite recipes --kind {kind}` lists them"
        raise RecipeError(f"no {kind} recipe named {name}", f"known: {', '.join(known) or 'none'}", hint)
    return (recipe_folder(kind) / f"{name}.yaml").read_text(encoding="utf-8")
