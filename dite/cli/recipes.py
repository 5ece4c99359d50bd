"""`dite recipes ls | show | validate`: the built-in recipes and protocols, listed, printed, and files checked before they are used."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from dite.cli import options
from dite.cli.output import Answer
from dite.errors import RecipeError, did_you_mean
from dite.recipe import QuantRecipe, problems, read_yaml, read_yaml_file, recipe_folder, recipe_names, recipe_of_plan

USED_BY = {"quant": "recipes for dite quantize --recipe NAME", "eval": "protocols for dite eval --protocol NAME"}
WITH_WEIGHTS = ("inception", "dinov2", "clip")  # extractors that come without; named here because their own module loads torch
FILES = (".yaml", ".yml", ".json")


class Kind(StrEnum):
    """Folders of built-in recipes."""

    quant = "quant"
    eval = "eval"


class _Group(TyperGroup):
    """`dite recipes w4a8` names a recipe where a command is wanted: say what to write instead."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands and (any(word in recipe_names(kind) for kind in Kind) or word.endswith(FILES)):
            raise RecipeError(f"no command {word}", f"{word} is a recipe, and a command is wanted: ls, show or validate", f"dite recipes show {word}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Group, help="The built-in recipes and protocols; and recipe files, printed or checked. Alone: as ls.")

OneKind = Annotated[
    Kind | None, typer.Option("--kind", help="Only recipes for `dite quantize`, or only protocols for `dite eval`.", show_default=False)
]


@app.callback(invoke_without_command=True)
def recipes(
    context: typer.Context, json: options.Json = False, no_progress: options.NoProgress = False, verbose: options.Verbose = False
) -> Answer | None:
    """The built-in recipes and protocols; and recipe files, printed or checked. Alone: as ls."""
    return _listed(tuple(Kind)) if context.invoked_subcommand is None else None


@app.command()
def ls(kind: OneKind = None, json: options.Json = False, no_progress: options.NoProgress = False, verbose: options.Verbose = False) -> Answer:
    """List the built-in recipes and protocols, with what they do."""
    return _listed((kind,) if kind else tuple(Kind))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A recipe or protocol, or a file with one.", show_default=False)],
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Print a recipe or protocol: what it prints is a valid file again."""
    text, values = _read(name)
    return Answer({"name": values.get("name", name), "kind": _kind(values, name).value, "recipe": values}, text)


@app.command()
def validate(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Recipes, protocols, files.", show_default=False)],
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Check recipes and protocols as the commands that use them do; all of them, then exit with 2 if any is wrong.

    What a protocol names and this machine lacks (weights, statistics) is a note, and no failure.
    """
    found = [_checked(name) for name in names]
    wrong = [one for one in found if one.problems]
    document = {"checked": len(found), "invalid": len(wrong), "recipes": [one.to_dict() for one in found]}
    failure = None
    if wrong:
        count = sum(len(one.problems) for one in wrong)
        what = f"{len(wrong)} of {len(found)} recipes can't be used"
        why = f"{count} problem{'s' if count > 1 else ''} in {', '.join(one.source for one in wrong)}"
        failure = RecipeError(what, why, "each is listed above with what to try")
    return Answer(document, "\n".join(line for one in found for line in one.lines()), failure)


@dataclass
class _Checked:
    """One recipe, what is wrong with it, and what its protocol needs that isn't here."""

    source: str
    name: str | None = None
    kind: Kind | None = None
    problems: list[RecipeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        problems = [{key: value for key, value in one.to_dict().items() if key != "type"} for one in self.problems]
        return asdict(self) | {"valid": not self.problems, "problems": problems}

    def lines(self) -> list[str]:
        what = {Kind.quant: "recipe", Kind.eval: "protocol", None: "file"}[self.kind]
        lines = [f"{self.source}: {f'no valid {what}' if self.problems else f'a valid {what}'}"]
        for one in self.problems:
            lines += [f"  problem: {one.what}", f"      why: {one.why}", f"      try: {one.hint}"]
        return [line for line in lines if not line.endswith(": ")] + [f"  note: {note}" for note in self.notes]


def _checked(source: str) -> _Checked:
    found = _Checked(source)
    try:
        _, values = _read(source)
        found.name = str(values["name"]) if "name" in values else None
        found.kind = _kind(values, source)
    except RecipeError as error:
        found.problems.append(error)
        return found
    if found.kind is Kind.quant:
        found.problems = problems(QuantRecipe, values)
        return found
    from dite_evals.protocols import FidelityProtocol, FidProtocol

    model = FidProtocol if values["kind"] == "fid" else FidelityProtocol
    found.problems = problems(model, values, "protocol")
    if not found.problems and model is FidProtocol:
        found.notes = _missing(values)
    return found


def _missing(values: dict[str, Any]) -> list[str]:
    """What a valid FID protocol needs and this machine lacks."""
    extractor, weights, statistics = values["extractor"], values.get("weights"), values.get("statistics")
    notes = []
    if extractor in WITH_WEIGHTS and weights is None:
        notes.append(f"weights are not given: extractor {extractor} needs --set weights=PATH")
    elif weights is not None and not Path(weights).exists():
        notes.append(f"no weights at {weights}")
    if extractor not in WITH_WEIGHTS and not _is_here(extractor):
        notes.append(f"no extractor at {extractor}")
    if statistics is None:
        notes.append("statistics are not given: they need --set statistics=FILE, written by dite eval stats")
    elif not _is_here(statistics):
        notes.append(f"no statistics at {statistics}")
    return notes


def _is_here(place: str) -> bool:
    from dite.models.builtin import builtin_names

    return place.removeprefix("builtin:") in builtin_names() if place.startswith("builtin:") else Path(place).exists()


def _listed(kinds: tuple[Kind, ...]) -> Answer:
    found = [
        {"name": name, "kind": kind.value, "description": _builtin(kind, name)[1].get("description", "")}
        for kind in kinds
        for name in recipe_names(kind)
    ]
    width = max((len(entry["name"]) for entry in found), default=0)
    groups = []
    for kind in kinds:
        rows = [f"  {entry['name']:{width}}  {entry['description']}".rstrip() for entry in found if entry["kind"] == kind]
        groups.append("\n".join([USED_BY[kind], *rows]))
    return Answer({"recipes": found}, "\n\n".join(groups))


def _read(source: str) -> tuple[str, dict[str, Any]]:
    """Text and contents of a file or of the built-in recipe of that name, whatever its kind."""
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        values = recipe_of_plan(path)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True), values
    if path.is_file():
        values = read_yaml_file(path)
        return path.read_text(encoding="utf-8"), values
    if path.suffix in FILES:
        raise RecipeError(f"no recipe file {path}", "the file does not exist", "check the path, or use a name from `dite recipes ls`")
    kinds = [kind for kind in Kind if source in recipe_names(kind)]
    if len(kinds) > 1:
        why = f"it names a recipe of each of the kinds {' and '.join(kinds)}"
        raise RecipeError(f"{source} is ambiguous", why, f"give the file, as in recipes/{kinds[0]}/{source}.yaml")
    if not kinds:
        known = [name for kind in Kind for name in recipe_names(kind)]
        hint = did_you_mean(source, known) or "`dite recipes ls` lists them; or give a .yaml file"
        raise RecipeError(f"no recipe or protocol named {source}", f"known: {', '.join(known) or 'none'}", hint)
    return _builtin(kinds[0], source)


def _builtin(kind: Kind, name: str) -> tuple[str, dict[str, Any]]:
    text = (recipe_folder(kind) / f"{name}.yaml").read_text(encoding="utf-8")
    return text, read_yaml(text, name)


def _kind(values: dict[str, Any], source: str) -> Kind:
    """Protocols say `kind`, and only recipes have `defaults`."""
    said = values.get("kind")
    if said in ("fid", "fidelity"):
        return Kind.eval
    if said is None and "defaults" in values:
        return Kind.quant
    why = f"kind is {said!r}" if said is not None else "it has neither the defaults of a recipe nor the kind of a protocol"
    raise RecipeError(f"{source} is neither a recipe nor a protocol", why, "recipes have defaults, protocols kind: fid or kind: fidelity")
