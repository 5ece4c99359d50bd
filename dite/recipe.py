"""Recipes: what a user writes in YAML, checked once, and what a saved model's config stores."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dite.errors import RecipeError, did_you_mean
from dite.quant.scheme import ActivationScheme, GroupSize, LayerScheme, Strict, WeightScheme


class LayerDefaults(Strict):
    """How one kind of linear is quantized. `weight: null` leaves that kind alone."""

    weight: WeightScheme | None
    activation: ActivationScheme | None = None

    @model_validator(mode="after")
    def _no_activation_alone(self) -> Self:
        if self.weight is None and self.activation is not None:
            raise ValueError("activation is quantized together with the weight only; with weight: null, leave it out or set it to null")
        return self


class Defaults(Strict):
    """`token` linears see a sequence, `conditioning` linears one vector a sample (adaLN and the like)."""

    token: LayerDefaults
    conditioning: LayerDefaults


class WeightOverride(Strict):
    """The keys of a weight scheme that a pattern changes; keys not given stay as they are."""

    num_bits: Literal[4, 6, 8] = 8
    group_size: GroupSize = None
    symmetric: bool = False


Transform = Literal["none", "hadamard", "smooth", "smooth+hadamard", "lowrank", "hadamard+lowrank", "smooth+lowrank", "auto"]


class LayerOverride(Strict):
    """What a pattern of `layers` changes (only the keys given); `skip: reason` or `weight: null` leaves its layers alone."""

    weight: WeightOverride | None = None
    activation: ActivationScheme | None = None
    transform: Transform | None = None
    skip: str | None = None


class Search(Strict):
    """How bits, groups and transforms are shared out over the layers: `none` (as the recipe says), `dp` or `evolution`, within one budget.

    Budgets: `budget_bytes` of the transformer's weights on disk, `budget_bits` a quantized weight on average (scales and all), `budget_time_ms` of
    the quantized layers in one forward. `fitness` is `surrogate` (error of short trajectories) or `fid`. Token layers choose from `bits` ×
    `group_sizes` × `transforms`, conditioning layers from the bits and groups.
    At most `max_forwards` sample-forwards are spent. `fid_samples` images by `fid_protocol` make one FID.
    """

    strategy: Literal["none", "dp", "evolution"] = "none"
    fitness: Literal["surrogate", "fid"] = "surrogate"
    budget_bytes: int | None = Field(default=None, gt=0)
    budget_bits: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    budget_time_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bits: list[Literal[4, 6, 8]] = Field(default=[4, 6, 8], min_length=1)
    group_sizes: list[GroupSize] = Field(default=[64, 128, None], min_length=1)
    fid_protocol: str = "cifar10-5k"
    fid_samples: int = Field(default=800, ge=2)
    transforms: list[Literal["none", "hadamard", "smooth", "smooth+hadamard", "lowrank", "hadamard+lowrank", "smooth+lowrank"]] = Field(
        default=["hadamard", "smooth+hadamard", "hadamard+lowrank"], min_length=1
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_forwards: int = Field(default=50_000, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("budget_bytes", "budget_bits", "budget_time_ms") if getattr(self, name) is not None]
        if self.strategy == "none" and given:
            raise ValueError(f"{given[0]} is for a search; set strategy to dp or evolution")
        if self.active and not given:
            raise ValueError(f"{self.strategy} needs a budget: budget_bytes, budget_bits or budget_time_ms")
        if self.strategy == "dp" and self.fitness == "fid":
            raise ValueError("dp measures single layers, whose FID is noise; use strategy evolution, or fitness surrogate")
        if len(given) > 1:
            raise ValueError(f"one budget at a time; {' and '.join(given)} are given")
        return self

    @property
    def active(self) -> bool:
        return self.strategy != "none"


class Calibration(Strict):
    """Trajectories to calibrate on: `num_samples` of them, `num_steps` each, with `guidance`, seeded.

    About `num_calls` of the denoiser's calls are kept, a quarter of them to judge by. `prompts` are for models that read text; there they are
    required.
    """

    num_samples: int = Field(default=64, ge=8, le=4096)
    num_steps: int = Field(default=50, ge=1, le=1000)
    guidance: float = Field(default=4.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**32)
    num_calls: int = Field(default=64, ge=4)
    prompts: list[str] = Field(default_factory=list)


class Gptq(Strict):
    """`ordered` rounds important columns first; without it, it is the original (left to right). `shrink` lets ranges leave out extremes.

    Shrinking lowers the output error of single layers and *raises* that of whole trajectories (W4A8 of the built-in model: by 8% with rotations, by
    30% without): what it does to a weight's extremes has the same sign at every step and adds up.
    """

    ordered: bool = True
    shrink: bool = False


class QuantRecipe(Strict):
    """A whole recipe: the contents of `recipes/quant/*.yaml`.

    `transform` and `rounding` say what is tried on each layer: with `auto` the best on held-out inputs is kept, as far as `effort` goes; `fast` does
    not calibrate, and rounds to nearest, where they say auto. `rank` is that of transforms with a low-rank part. `linears` is in recipes read
    from a `plan.json`: the digest of the linears that it was found for. `text_encoders` rounds the weights of a pipeline's text encoders too; without
    it they are left alone.
    """

    name: str
    description: str = ""
    defaults: Defaults
    transform: Transform = "none"
    rank: int = Field(default=16, ge=1, le=256)
    rounding: Literal["nearest", "gptq", "auto"] = "nearest"
    gptq: Gptq = Field(default_factory=lambda: Gptq())
    effort: Literal["fast", "default", "high"] = "default"
    calibration: Calibration = Field(default_factory=lambda: Calibration())
    search: Search = Field(default_factory=Search)
    layers: dict[str, LayerOverride] = Field(default_factory=dict)
    text_encoders: WeightScheme | None = None
    linears: str | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the model must be run to carry this recipe out."""
        nothing_to_choose = self.rounding == "nearest" and self._transforms == {"none"}
        return not (self.lenient and (self.effort == "fast" or nothing_to_choose))

    @property
    def lenient(self) -> bool:
        """Whether rounding to nearest is within what the recipe asks for, where nothing can be calibrated."""
        return not self.search.active and self.rounding in ("nearest", "auto") and self._transforms <= {"none", "auto"}

    def uncalibrated(self) -> QuantRecipe:
        """The same, with `auto` settled without calibration; only for a lenient recipe."""
        return self.model_copy(update={"effort": "fast"})

    @property
    def _transforms(self) -> set[str]:
        return {self.transform, *(override.transform for override in self.layers.values() if override.transform)}

    def transform_of(self, name: str) -> str | None:
        """The transform that a pattern gives layer `name`; later patterns win."""
        given = [override.transform for pattern, override in self.layers.items() if override.transform and fnmatch.fnmatchcase(name, pattern)]
        return given[-1] if given else None

    def names(self, name: str) -> bool:
        """Whether a pattern gives layer `name` a weight scheme: then it is quantized even outside the blocks."""
        return any(override.weight is not None and fnmatch.fnmatchcase(name, pattern) for pattern, override in self.layers.items())

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of `names`."""
        names = list(names)
        return [pattern for pattern in self.layers if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]

    def scheme(self, name: str, kind: Literal["token", "conditioning"]) -> LayerScheme | str:
        """The scheme of layer `name`, or the reason why it is skipped. Later patterns win."""
        defaults: LayerDefaults = getattr(self.defaults, kind)
        weight, activation = defaults.weight, defaults.activation
        skip = f"the recipe leaves {kind} linears alone" if weight is None else None
        for pattern, override in self.layers.items():
            if not fnmatch.fnmatchcase(name, pattern):
                continue
            skip = override.skip or skip
            if "weight" in override.model_fields_set and override.weight is None:
                skip = override.skip or f"the recipe's pattern {pattern} leaves it alone"
            if override.weight is not None:
                weight = WeightScheme(**((weight or WeightScheme()).model_dump() | override.weight.model_dump(exclude_unset=True)))
                skip = override.skip
            if "activation" in override.model_fields_set:
                activation = override.activation
        return skip or LayerScheme(weight=weight, activation=activation)


def load_recipe(source: str | Path | dict | QuantRecipe, overrides: list[str] | None = None) -> QuantRecipe:
    """A recipe by name, file (YAML, or the `plan.json` of a search, to repeat what it found), or contents, with `a.b=c` overrides applied.

    Raises RecipeError that names the nearest recipe or key when one is unknown.
    """
    if isinstance(source, QuantRecipe):
        values = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, dict):
        values = source
    else:
        values = _read(source)
    for override in overrides or []:
        values = override_key(values, override)
    return validate(QuantRecipe, values)


def recipe_names(kind: str = "quant") -> list[str]:
    """Names of the built-in recipes of a kind (`quant`, `eval`)."""
    return sorted(path.name.removesuffix(".yaml") for path in recipe_folder(kind).iterdir() if path.name.endswith(".yaml"))


def recipe_folder(kind: str):
    """Where the built-in recipes of a kind lie: inside the wheel, or in the source tree for an editable install."""
    packaged = resources.files("dite") / "_recipes" / kind
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes" / kind


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may appear once: SafeLoader would let the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} appears twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml_file(path: Path) -> dict[str, Any]:
    """`read_yaml` of a file in UTF-8."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text", f"it is not UTF-8 at byte {error.start}", "save it as UTF-8") from error


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse a YAML mapping; RecipeError otherwise."""
    try:
        values = _UniqueKeys(text).get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML", " ".join(str(error).split()), "check the indentation near that line") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where} is not a recipe", f"a recipe is a mapping of keys, this is a {type(values).__name__}", "see `dite recipes show w4a8`"
        )
    return values


def validate(model: type[BaseModel], values: dict[str, Any], what: str = "recipe"):
    """Build `model`, a `what`, from `values`; its first error becomes a RecipeError with the nearest known key."""
    found = problems(model, values, what)
    if found:
        raise found[0] from found[0].__cause__
    return model.model_validate(values)


def problems(model: type[BaseModel], values: dict[str, Any], what: str = "recipe") -> list[RecipeError]:
    """Everything that keeps `values` from being a `model`, in the order of the keys; empty when nothing does."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        found = [_problem(model, one, what) for one in error.errors()]
        for one in found:
            one.__cause__ = error
        return found
    return []


def _problem(model: type[BaseModel], error: Any, what: str) -> RecipeError:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        hint = did_you_mean(str(error["loc"][-1]), known) or "keys are written from the top, as a.b.c; `dite recipes show NAME` prints a recipe's"
        return RecipeError(f"unknown {what} key {path}", f"known keys there: {', '.join(sorted(known))}", hint)
    if error["type"] == "missing":  # the input is what the key is missing from: all the other keys
        return RecipeError(f"{what} key {path} is missing", "it has no default", "`dite recipes ls` names working examples")
    message = error["msg"].removeprefix("Value error, ")
    if not path:  # of all keys together: the values may hold a secret
        return RecipeError(f"these {what} keys contradict each other", message)
    return RecipeError(f"{what} key {path} is wrong", f"{message} (got {error['input']!r})", "`dite recipes ls` names working examples")


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return recipe_of_plan(path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}", "the file does not exist", "check the path, or use a name from `dite recipes ls`")
        return read_yaml_file(path)
    names = recipe_names()
    if str(source) not in names:
        raise RecipeError(
            f"no recipe named {source}", f"known: {', '.join(names)}", did_you_mean(str(source), names) or "give a name or a .yaml file"
        )
    return read_yaml((recipe_folder("quant") / f"{source}.yaml").read_text(encoding="utf-8"), str(source))


def recipe_of_plan(path: Path) -> dict[str, Any]:
    """The recipe that repeats the plan in a `plan.json`: its own recipe, without the search, every layer spelled out."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        recipe, layers = dict(plan["recipe"]), dict(plan["recipe"].get("layers", {}))
        for layer in plan["layers"]:
            layers[layer["name"]] = {"weight": {"num_bits": layer["weight_bits"], "group_size": layer["group_size"]}, "transform": layer["transform"]}
        ranks = {layer["rank"] for layer in plan["layers"]} - {0}
        return recipe | {"search": {}, "layers": layers, "linears": plan["model"]["linears"]} | ({"rank": max(ranks)} if ranks else {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else "it is no JSON object with recipe, layers and model"
        raise RecipeError(f"{path} is not a plan", why, "give the plan.json that `dite quantize --search` wrote") from error


def override_key(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `values` with one `a.b=c` of `--set` applied; `c` is YAML. Raises RecipeError when it can't be read."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override} has no value", "the form is key.key=value", "for example --set defaults.token.weight.group_size=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override} can't be read", " ".join(str(error).split()), "values are YAML: 64, true, null, [1, 2]") from error
    return _with(values, _keys(path), value, path)


def _keys(path: str) -> list[str]:
    """`layers` is followed by a layer's name or pattern, which may hold dots itself.

    >>> _keys("layers.blocks.0.attn1.to_q.weight.num_bits")
    ['layers', 'blocks.0.attn1.to_q', 'weight', 'num_bits']
    """
    keys = path.split(".")
    if keys[0] != "layers":
        return keys
    end = next((index for index in range(2, len(keys)) if keys[index] in LayerOverride.model_fields), len(keys))
    return ["layers", ".".join(keys[1:end]), *keys[end:]] if len(keys) > 1 else keys


def _with(values: dict[str, Any], keys: list[str], value: Any, path: str) -> dict[str, Any]:
    """A copy of `values` with one nested key replaced."""
    head, *rest = keys
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    inner = {} if inner is None else inner
    if not isinstance(inner, dict):
        raise RecipeError(
            f"--set {path} goes too deep", f"{head} holds {inner!r}, which has no keys", "see `dite recipes show NAME` for the structure"
        )
    return {**values, head: _with(inner, rest, value, path)}


def _fields_at(model: type[BaseModel], path: tuple) -> list[str]:
    """Field names of the model that lies at `path` inside `model`."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            candidates = [candidate, *getattr(candidate, "__args__", ())]
            found = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
            if found:
                model = found
                break
    return list(model.model_fields)
