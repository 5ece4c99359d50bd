"""`dite quantize`: a model, a recipe, a folder."""

import shlex
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

import dite
from dite.cli import options
from dite.cli.output import Answer, megabytes, note, progress
from dite.errors import ResumeConflict, UsageError
from dite.recipe import load_recipe

WORST = 5  # layers shown in the summary; --json has all


def quantize(
    model: options.Model,
    output: options.Output,
    recipe: options.Recipe = "w4a8",
    set: options.Set = None,
    effort: options.EffortLevel = None,
    search: options.SearchStrategy = None,
    budget_bytes: options.BudgetBytes = None,
    budget_bits: options.BudgetBits = None,
    budget_time: options.BudgetTime = None,
    text_encoders: options.TextEncoders = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer:
    """Quantize a model into a folder that plain from_pretrained loads."""
    budgets = {"budget_bytes": budget_bytes, "budget_bits": budget_bits, "budget_time_ms": budget_time}
    flags = {"effort": effort, "search.strategy": search, "text_encoders.num_bits": text_encoders} | {
        f"search.{key}": value for key, value in budgets.items()
    }
    if any(value is not None for value in budgets.values()):  # the one that is given replaces the recipe's
        flags |= {f"search.{key}": "null" for key, value in budgets.items() if value is None}
    chosen = load_recipe(recipe, [*(set or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)])
    from dite.checkpoint.save import check_output  # after the recipe: a typing mistake is answered before torch is loaded

    check_output(output, overwrite)
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise UsageError(f"{output} is the model itself", "--overwrite would replace the original by its quantized copy", "choose another -o")
    from dite.outputs import OutputLock

    # Held to the end: of two runs that work for hours, one would work for nothing; and a living run's journal must not pass for an interrupted one's.
    with nullcontext() if dry_run else OutputLock(output) as lock:
        journal = journal_of(output) if chosen.calibrated else None
        if journal is not None:
            check_journal(journal, resume)
        elif resume:
            raise UsageError("there is nothing to resume", "only calibration and search keep a journal; this recipe rounds", "leave --resume out")
        from dite.models.load import load_pipeline

        pipe = load_pipeline(model, dtype=dtype and dtype.value, device=device)
        if dry_run:
            from dite.ptq.quantize import plan

            return _planned(plan(pipe, chosen), output, chosen, _encoders(pipe, chosen))
        report = _quantized(pipe, chosen, output, Run(no_progress, journal, resume, overwrite, lock))
    for line in report.notes:
        note(line)
    for pattern in report.unmatched_patterns:
        note(f"the recipe's pattern {pattern} names no linear of this model")
    document = {"output": str(output)} | report.to_dict()
    return Answer(document, _summary(document, model, report.wide, _conditions(pipe)))


@dataclass(frozen=True)
class Run:
    """What a run was told besides model and recipe."""

    no_progress: bool
    journal: Path | None
    resume: bool
    overwrite: bool
    lock: Any


def _quantized(pipe: Any, chosen: Any, output: Path, run: Run) -> Any:
    """Quantize and save; returns the report."""
    journal = run.journal
    with progress(run.no_progress) as tick:
        try:
            report = dite.quantize(pipe, chosen, progress=tick, journal=journal)
        except UsageError:  # the budget, the model, the forwards: going on would end in the same
            if journal is not None and not run.resume:
                shutil.rmtree(journal, ignore_errors=True)
            raise
    note(f"writing {output}")
    dite.save(pipe, output, overwrite=run.overwrite, attachments=_page(report.plan), lock=run.lock)
    if journal is not None:
        shutil.rmtree(journal, ignore_errors=True)  # there is none where nothing could be calibrated
    return report


def journal_of(output: Path) -> Path:
    """Where a run that writes `output` keeps what it has done."""
    return output.with_name(output.name + ".journal")


def check_journal(journal: Path, resume: bool) -> None:
    """Raise ResumeConflict when an interrupted run lies there and nobody asked to go on with it."""
    from dite.ptq.journal import holds_work

    if not resume and holds_work(journal):
        raise ResumeConflict(f"{journal} holds an interrupted run", "what it has done would be lost", "add --resume, or delete that folder")
    if resume and not journal.exists():
        raise ResumeConflict("there is no interrupted run to resume", f"{journal} does not exist", "leave --resume out, or check -o")


def _page(plan: dict | None) -> dict[str, str]:
    if plan is None:
        return {}
    from dite_evals.plan_html import plan_html

    return {"plan.html": plan_html(plan)}


def _encoders(pipe: Any, chosen: Any) -> dict[str, Any]:
    """The plans of the text encoders, where the recipe asks for them."""
    from dite.ptq.text_encoders import plan_text_encoders

    return {one.name: one.plan for one in plan_text_encoders(pipe, chosen.text_encoders)} if chosen.text_encoders else {}


def _planned(plan, output, recipe, encoders) -> Answer:
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "scheme": layer.scheme.model_dump(mode="json"),
        }
        for layer in plan.layers
    ]
    table = Table("layer", "kind", "in", "out", "weight", "activation", box=None, padding=(0, 2, 0, 0))
    for layer in layers:
        weight, activation = layer["scheme"]["weight"], layer["scheme"]["activation"]
        groups = f"groups of {weight['group_size']}" if weight["group_size"] else "per channel"
        per = f"{activation['num_bits']} bits a {activation['granularity']}" if activation else "as it is"
        table.add_row(
            layer["name"], layer["kind"], str(layer["in_features"]), str(layer["out_features"]), f"{weight['num_bits']} bits, {groups}", per
        )
    skipped = [f"skipped {name}: {reason}" for name, reason in plan.skipped.items()]
    search = recipe.search
    if search.active:
        skipped.append(f"bits, groups and transforms as above are where the search ({search.strategy}) starts; it changes them within its budget")
    for name, one in encoders.items():
        skipped.append(f"{name}: {len(one.layers)} layers, {recipe.text_encoders.num_bits} bits, about {megabytes(one.estimated_bytes)}")
    total = f"{len(layers)} layers, about {megabytes(plan.estimated_bytes)}; nothing was written to {output}"
    document = {
        "dry_run": True,
        "search": search.strategy,
        "output": str(output),
        "layers": layers,
        "skipped": plan.skipped,
        "text_encoders": {name: {"layers": len(one.layers), "estimated_bytes": one.estimated_bytes} for name, one in encoders.items()},
        "estimated_bytes": plan.estimated_bytes,
    }
    return Answer(document, Group(table, *map(escape, skipped), escape(total)))


def _conditions(pipe: Any) -> str:
    """What `dite generate` needs to be told for this model, as an example."""
    from dite.sampling import takes_classes

    return "-n 10" if not hasattr(pipe, "components") or takes_classes(pipe) else '--prompt "a ship at sea"'


def _summary(document: dict, model: str, wide: bool, drawn: str) -> Group:
    """From how much to how much, where it hurts most, and what to do next."""
    before, after, output = document["baseline_bytes"], document["bytes"], document["output"]
    ratio = f"{before / after:.2f} times smaller" if after < before else "no smaller"
    if wide:
        ratio += f"; with --dtype bfloat16, {megabytes(document['bf16_bytes'])}: what is not quantized keeps its precision"
    size = f"{megabytes(before)} in bf16 → {megabytes(after)}: {ratio}"
    layers = f"{len(document['layers'])} layers, {len(document['skipped'])} left alone"
    cost = f"{document['seconds']:.1f} s, peak memory {megabytes(document['peak_memory_bytes'])}, {layers}"
    measured = [layer for layer in document["layers"] if layer.get("error") is not None]
    of = "outputs, held out" if any(layer.get("error_of") == "outputs" for layer in measured) else "weights"
    worst = Table("largest errors", "bits", f"relative error of {of}", box=None, padding=(0, 2, 0, 0))
    for layer in sorted(measured, key=lambda layer: -layer["error"])[:WORST]:
        worst.add_row(layer["name"], f"w{layer['weight_bits']}a{layer['activation_bits'] or 16}", f"{layer['error']:.4f}")
    quoted, base = shlex.quote(output), shlex.quote(model)
    steps = [
        f"next:  dite generate {quoted} {drawn} --compare {base} -o {shlex.quote(output + '-pictures')}",
        f"       dite eval fidelity {quoted} --baseline {base} --n 32",
    ]
    if document["search"]:
        found = document["search"]
        cost += f"; searched {found['search']['forwards']} sample-forwards, error {found['error']:.4f}; see {output}/plan.html"
    texts = [
        f"{name}: {one['layers']} layers, {megabytes(one['baseline_bytes'])} in bf16 → {megabytes(one['bytes'])}"
        for name, one in document["text_encoders"].items()
    ]
    return Group(f"[bold]{escape(output)}[/bold]  {size}", cost, *texts, "", *([worst, ""] if measured else []), *map(escape, steps))
