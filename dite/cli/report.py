"""`dite report`: everything measured of one model on one page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dite.cli import options
from dite.cli.output import Answer
from dite.errors import UsageError
from dite.outputs import check_writable

if TYPE_CHECKING:
    from dite_evals.model_report import Subject


def report(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write report.json, report.html and report.md there, over an earlier page.", show_default=False
        ),
    ],
    quantization: Annotated[
        Path | None,
        typer.Option("--quantization", metavar="FILE", help="What `dite quantize --json` printed: the error of each layer.", show_default=False),
    ] = None,
    eval_: Annotated[
        list[Path] | None, typer.Option("--eval", metavar="PATH", help="A report.json of `dite eval`, or the folder that holds it. Repeatable.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option("--bench", metavar="FILE", help="JSON of `dite bench linear`, `forward` or `exchange`. Repeatable.")
    ] = None,
    exchange: Annotated[
        list[Path] | None,
        typer.Option("--exchange", metavar="FILE", help="JSON of `dite bench exchange`, or of `dite generate --nproc`. Repeatable."),
    ] = None,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Gather what was measured of one model: quantization, quality, speed and exchange on one page. Figures of another model are refused."""
    _check_output(output)
    missing = next(
        (path for path in (quantization, *(eval_ or []), *(bench or []), *(exchange or [])) if path is not None and not path.exists()), None
    )
    if missing is not None:
        raise UsageError(f"no file {missing}", "it does not exist", "check the path")
    from dite_evals.model_pages import write_model_report
    from dite_evals.model_report import Files, gather

    document = gather(_subject(model), Files(quantization, eval_ or [], bench or [], exchange or []))
    paths = write_model_report(document, output)
    lines = [f"{entry['section']} not measured: {entry['command']}" for entry in document["not_measured"]]
    return Answer(document | {"report": paths}, "\n".join([paths["html"], *lines]))


def _check_output(output: Path) -> None:
    from dite_evals.model_pages import check_page

    check_writable(output)
    check_page(output)


def _subject(model: str) -> Subject:
    """The model, loaded once as it is stored, and again for each other dtype that a report ran in."""
    import dite
    from dite.checkpoint.diffusers_quantizer import recipe_of, search_plan_of
    from dite.models.access import denoisers, the_denoiser
    from dite.models.digest import dtype_name, model_digest
    from dite.models.load import load_pipeline
    from dite.quant.apply import state_bytes
    from dite_evals.model_report import Subject

    pipe = load_pipeline(model)
    stored, parts = dtype_name(pipe), denoisers(pipe)
    inspected = dite.inspect(pipe).to_dict()
    plan = next(filter(None, map(search_plan_of, parts.values())), None)
    recipe = next(filter(None, map(recipe_of, parts.values())), None)
    size = sum(map(state_bytes, parts.values()))
    own = model_digest(pipe)

    @cache
    def digest(dtype: str) -> str:
        return own if dtype == stored else model_digest(load_pipeline(model, dtype=dtype))

    return Subject(
        source=model,
        facts={
            "model_class": inspected["model_class"],
            "pipeline": type(pipe).__name__,
            "parameters": inspected["parameters"],
            "dtype": stored,
            "bytes": size,
        },
        dtype=stored,
        digest=digest,
        recipe=recipe.name if recipe else None,
        layers=_layers(parts, inspected["linears"], plan),
        skipped=_skipped(the_denoiser(pipe)),
        linears=inspected["linears"],
        sizes={"bytes": size, "baseline_bytes": sum(map(_baseline_bytes, parts.values()))},
        plan=plan,
    )


def _layers(parts: dict[str, Any], linears: list[dict[str, Any]], plan: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Quantized layers as `dite quantize --json` tells them; with their errors where a search left its plan."""
    from dite.ptq.plan_document import layer_facts
    from dite.quant.apply import quantized_layers
    from dite.quant.plan import LayerPlan

    kinds = {linear["name"]: linear["kind"] for linear in linears}
    errors = {layer["name"]: layer for layer in (plan or {}).get("layers", [])}
    found = []
    for part, model in parts.items():
        prefix = f"{part}." if len(parts) > 1 else ""
        for name, layer in quantized_layers(model).items():
            facts = layer_facts(prefix, LayerPlan(name, kinds.get(name, "token"), layer.in_features, layer.out_features, layer.scheme))
            recorded = errors.get(prefix + name, {})
            facts["rounding"] = recorded.get("rounding")
            found.append(facts | {"error": recorded.get("error"), "error_of": "outputs" if recorded else None})
    return found


def _skipped(model: Any) -> dict[str, str]:
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return dict(config.plan.skipped) if hasattr(config, "plan") else {}


def _baseline_bytes(model: Any) -> int:
    """What the weights took in bf16 before anything was quantized."""
    from dite.quant.apply import quantized_layers

    layers = quantized_layers(model)
    codes = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}
    others = sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in codes)
    return 2 * (others + sum(layer.in_features * layer.out_features for layer in layers.values()))
