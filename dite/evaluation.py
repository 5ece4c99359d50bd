"""`dite.evaluate`: image quality of a model, as a protocol says. The metrics live in `dite_evals`, reached when first used."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dite.errors import UsageError, did_you_mean
from dite.parallel.launch import environment_ranks

if TYPE_CHECKING:
    from dite_evals.fid_run import FidRun
    from dite_evals.protocols import FidelityProtocol, FidProtocol
    from dite_evals.workers import Workers

Tick = Callable[[str, int, int], None]
FIDELITY_KEYS = ("n", "psnr.mean", "psnr.p05", "psnr.interval.0", "psnr.interval.1", "ssim", "latent_relative_error", "per_step_error.N", "seconds")
FID_METRICS = ("fid", "fid_corrected", "fid_infinity", "sfid", "kid", "precision", "recall", "cmmd", "inception_score")
FID_KEYS = (*FID_METRICS, "n", "interval.0", "interval.1", *(f"{name}_interval.{end}" for name in FID_METRICS[1:] for end in (0, 1)), "seconds")


CHANGED = ", changed"  # behind the name of a protocol that was saved with overrides
RUN = ("device", "batch_size", "features_only", "force", "discard", "command")


def evaluate(
    model: Any,
    protocol: str | Path | dict[str, Any] = "fidelity-128",
    *,
    baseline: Any = None,
    n: int | None = None,
    seed: int | None = None,
    output: str | Path | None = None,
    progress: Tick | None = None,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Measure `model`, a pipeline or a source (folder, hub id, `builtin:NAME`), and return the metrics.

    A fidelity protocol needs `baseline`, the full-precision original, and returns `n, psnr: {mean, p05, interval}, ssim,
    latent_relative_error, per_step_error, seconds`. A FID protocol returns `fid, n, interval, extractor, protocol, seconds`, every other metric that
    the extractor and the reference allow (`fid_infinity, fid_corrected, sfid, kid, precision, recall, cmmd, inception_score`, each with its
    `…_interval`; None where it is left out, for the reason in `left_out`), and `features_sha256`, which is the same for the same samples.
    Keys of the protocol (`steps, guidance, dtype, micro_batch`…) given as `changes`, or before them as `key=value` in `overrides`, change it,
    and the result lists what they changed. `device` says where sources are loaded. For FID, `batch_size` is how many samples a shard holds (it
    changes no result); `features_only` deletes images once their features are stored; `force` measures with too few samples; `discard` deletes
    the shards of a run with other settings. `command` is the command line to put into the report.

    Started as several ranks (by `dite ... --nproc N`, `accelerate launch` or torchrun), each rank calls this, draws its part of a FID's samples
    and gets the same figures, the same to the bit whatever their number; rank 0 writes. A pipeline that `parallelize` has shared out is run by all
    ranks together instead.

    `output` receives `report.json`, `report.html`, `report.md` and `protocol.yaml`; FID also keeps its samples and features beside it
    (`OUTPUT.samples`), and an interrupted run goes on from there. `progress(stage, done, total)`. With `dry_run` everything is loaded and checked,
    nothing is sampled or written, and the answer says what would be: `protocol, overrides, micro_batches`.

    Raises UsageError, RecipeError, UnsupportedModel, UnsupportedEnvironment (no torchmetrics), ResumeConflict.
    """
    from dite_evals.protocols import load_protocol

    run = {key: changes.pop(key) for key in RUN if key in changes}
    if changes.get("dtype") is not None:
        changes["dtype"] = str(changes["dtype"]).removeprefix("torch.")
    settings, changed = load_protocol(protocol, overrides=overrides, n=n, seed=seed, **changes)
    job = _Job(model, settings, changed, Path(output).absolute() if output is not None else None, progress or _silent, dry_run, **run)
    with _threads(settings.threads):
        return _measure(job, settings, baseline)


def _measure(job: _Job, settings: Any, baseline: Any) -> dict[str, Any]:
    from dite_evals.protocols import FidelityProtocol

    if isinstance(settings, FidelityProtocol):
        return _fidelity(job, settings, baseline)
    if baseline is not None:
        raise UsageError(
            "a FID protocol takes no baseline",
            f"{settings.name} compares with reference statistics",
            "use a fidelity protocol, or leave baseline out",
        )
    return _fid(job, settings)


@dataclass
class _Job:
    """What both kinds of evaluation need to know, checked before anything is loaded."""

    model: Any
    settings: Any
    changed: dict[str, Any]
    output: Path | None
    progress: Tick
    dry_run: bool = False
    device: str = "cpu"
    batch_size: int | None = None
    features_only: bool = False
    force: bool = False
    discard: bool = False
    command: Sequence[str] = ()
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        from dite_evals.backend import torchmetrics
        from dite_evals.report import check_output

        torchmetrics("functional.image")
        if self.output is not None:
            check_output(self.output)
        self.writes = (environment_ranks() or (0, 1))[0] == 0

    def in_step(self) -> bool:
        """Whether the ranks run one pipeline together, which `parallelize` has shared out."""
        from dite.sampling import unwrap

        return not isinstance(self.model, str | Path) and bool(_exchange(unwrap(self.model)))

    def load(self, source: Any) -> Any:
        """The diffusers pipeline of a source or a pipeline; a pipeline must already have the protocol's dtype."""
        from dite.models.digest import dtype_name
        from dite.models.load import load_pipeline
        from dite.sampling import unwrap

        if isinstance(source, str | Path):
            return unwrap(load_pipeline(str(source), dtype=self.settings.dtype, device=self.device))
        pipe = unwrap(source)
        wanted, found = self.settings.dtype, dtype_name(pipe)
        if wanted is not None and wanted != found:
            raise UsageError(
                f"protocol {self.settings.name} runs in {wanted}",
                f"the pipeline is in {found}",
                f"pass dtype={found!r} to change the protocol, or load it in {wanted}",
            )
        return pipe

    def planned(self, models: int) -> dict[str, Any]:
        """The answer of a dry run."""
        batches = models * -(-self.settings.n // self.settings.micro_batch)
        return {"dry_run": True, "protocol": self.settings.model_dump(), "overrides": self.changed, "micro_batches": batches}

    def _as_run(self) -> dict[str, Any]:
        """The protocol as it was run: given again, it does the same."""
        settings = self.settings.model_dump()
        if self.changed:
            settings["name"] = f"{settings['name'].removesuffix(CHANGED)}{CHANGED}"
        return settings | ({"allow_few": True} if self.force and "allow_few" in settings else {})

    def finish(self, metrics: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
        """Add what every answer says, and write the report."""
        from dite_evals.report import Report, write_report

        metrics |= {"protocol": self.settings.name, "overrides": self.changed, "seconds": time.perf_counter() - self.start}
        if self.output is None or not self.writes:
            return metrics
        paths = write_report(Report(metrics=metrics, command=list(self.command), protocol=self._as_run(), **report), self.output)
        return metrics | {"report": paths}


def _fidelity(job: _Job, settings: FidelityProtocol, baseline: Any) -> dict[str, Any]:
    from dite.models.digest import dtype_name, model_digest
    from dite_evals.fidelity import PairedFidelity

    if baseline is None:
        raise UsageError(
            "fidelity needs something to compare with",
            "no baseline was given",
            "give the full-precision original, as in baseline='builtin:cifar10-dit'",
        )
    original, quantized = job.load(baseline), job.load(job.model)
    if job.dry_run:
        return job.planned(models=2)
    pairs = PairedFidelity()
    sides = [_samples(pipe, settings, job.progress, stage, trajectory=True) for pipe, stage in ((quantized, "model"), (original, "baseline"))]
    for ours, theirs in zip(*sides, strict=True):
        pairs.add(ours, theirs)
    return job.finish(
        pairs.metrics(),
        {
            "kind": "fidelity",
            "title": f"{source_name(job.model)} against {source_name(baseline)}",
            "configuration": _configuration(job, quantized)
            | {"baseline": source_name(baseline), "baseline_dtype": dtype_name(original), "baseline_sha256": model_digest(original)},
            "samples": pairs.rows(),
            "class_names": _names(quantized),
            "images": _stack(pairs.images),
            "baseline_images": _stack(pairs.baseline_images),
        },
    )


def _fid(job: _Job, settings: FidProtocol) -> dict[str, Any]:
    from dite_evals import workers
    from dite_evals.features import check_rank
    from dite_evals.fid import check_count
    from dite_evals.figures import compute_figures

    check_count(settings.n)
    extractor = open_extractor(settings.extractor, settings.weights, settings.resize)
    forced = job.force or settings.allow_few
    check_rank(settings.n, extractor.num_features, forced)
    statistics = open_statistics(settings.statistics)
    statistics.require(extractor)
    check_rank(statistics.moments.n, extractor.num_features, forced, "reference samples")
    together = workers.join(in_step=job.in_step())
    job.device = together.device(job.device)
    pipe = job.load(job.model)
    if job.dry_run:
        return job.planned(models=1)
    with _kept(job, together) as (folder, those):
        run = _fid_run(job, settings, pipe, extractor, folder, those)
        found = run.features()
        sheet = run.sheet()
        those.wait()  # before a scratch folder goes
    figures = compute_figures(found, extractor, statistics, forced)
    reference = {"reference": statistics.data_name, "reference_n": statistics.moments.n, "reference_sha256": statistics.data_sha256}
    reference |= {"reference_features": 0 if statistics.features is None else len(statistics.features)} | statistics.hashes()
    return job.finish(
        figures.metrics() | {"extractor": extractor.id, "num_features": extractor.num_features},
        {
            "kind": "fid",
            "title": f"FID of {source_name(job.model)}, {settings.name}",
            "configuration": _configuration(job, pipe) | reference | {"ranks": together.size},
            "curve": figures.curve,
            "replicates": figures.replicates(),
            "class_names": _names(pipe),
            "images": sheet,
        },
    )


def open_statistics(source: str | None) -> Any:
    """The `dite_evals.statistics.Statistics` of a file, or of a folder or `builtin:NAME` that holds one."""
    from dite.models.load import resolve
    from dite_evals.statistics import read_statistics

    if source is None:
        why = "this protocol leaves the reference to you"
        raise UsageError("there is nothing to measure against", why, "make it with `dite eval stats`, then --set statistics=FILE")
    path = Path(source)
    if path.suffix in (".safetensors", ".npz") and not path.is_file():
        raise UsageError(f"no statistics at {path}", "the file does not exist", "make it with `dite eval stats`")
    return read_statistics(path if path.is_file() else Path(resolve(source)) / "statistics.safetensors")


@contextmanager
def _kept(job: _Job, together: Workers) -> Iterator[tuple[Path, Workers]]:
    """Where samples are kept, and by whom: beside the output; or while this runs, where there is none."""
    from dite_evals import workers

    if job.output is not None:
        yield job.output.with_name(job.output.name + ".samples"), together
    elif together.size > 1 and not together.in_step:
        yield workers.scratch(), together
    else:
        with tempfile.TemporaryDirectory(prefix="dite_samples_") as folder:
            yield Path(folder), workers.Workers()


def _fid_run(job: _Job, settings: FidProtocol, pipe: Any, extractor: Any, folder: Path, together: Workers) -> FidRun:
    from dite_evals.fid_run import FidRun

    def draw(start: int, stop: int, tick: Callable[[int], None]) -> Iterator[Any]:
        for one in _samples(pipe, settings, lambda _stage, done, _total: tick(done), "sampling", start, stop):
            yield one.image

    return FidRun(
        folder=folder,
        configuration=_resume_key(job, pipe),
        extractor=extractor,
        n=settings.n,
        micro_batch=settings.micro_batch,
        steps=settings.steps,
        draw=draw,
        workers=together,
        device=pipe.device,
        shard=job.batch_size or 1,
        features_only=job.features_only,
        discard=job.discard,
        progress=lambda done, total: job.progress("sampling", done, total),
    )


def open_extractor(name: str, weights: str | Path | None = None, resize: str | None = None) -> Any:
    """The `dite_evals.extractors.Extractor` that `inception`, `dinov2`, `clip`, a folder or `builtin:NAME` stands for.

    Raises UsageError for an unknown name and for missing weights, CheckpointError for damaged ones, UnsupportedEnvironment.
    """
    from dite.models.load import resolve
    from dite_evals.extractors import NAMED, load_extractor

    if name in NAMED or Path(name).exists() or name.startswith("builtin:"):
        return load_extractor(name if name in NAMED else str(resolve(name)), weights, resize)
    hint = did_you_mean(name, NAMED) or "for example builtin:cifar10-dit"
    raise UsageError(f"no extractor {name}", f"it is neither {', '.join(NAMED)}, nor a folder, nor builtin:NAME", hint)


def _samples(pipe: Any, settings: Any, progress: Tick, stage: str, start: int = 0, stop: int | None = None, *, trajectory: bool = False):
    """Samples start..stop−1 of a protocol, n unless given; `start` is a multiple of the micro-batch, so that every sample keeps its row."""
    from dite.sampling import SampleSettings, class_ids, sample, sample_seed, takes_classes
    from dite_evals.protocols import balanced

    stop = settings.n if stop is None else stop
    conditions = balanced(class_ids(pipe) if takes_classes(pipe) else settings.prompts, stop)[start:]
    seeds = [sample_seed(settings.seed, index) for index in range(start, stop)]
    how = SampleSettings(settings.steps, settings.guidance, settings.micro_batch)
    for one in sample(pipe, conditions, seeds, how, progress=lambda done, total: progress(stage, done, total), trajectory=trajectory):
        yield replace(one, index=start + one.index)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch on the CPU; as many as before for None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resume_key(job: _Job, pipe: Any) -> dict[str, Any]:
    """Everything that an image depends on, N excepted: a longer run goes on from a shorter one."""
    import diffusers
    import torch

    import dite
    from dite.models.digest import dtype_name, model_digest
    from dite.models.inspect import stats

    settings = job.settings.model_dump(include={"steps", "guidance", "seed", "micro_batch", "prompts"})
    card = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else "cpu"
    tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) if card != "cpu" else ()
    machine = {"device": card, "tf32": list(tf32), "threads": torch.get_num_threads(), "backends": stats(pipe)["backends"]}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "dite": dite.__version__}
    return settings | machine | versions | {"dtype": dtype_name(pipe), "model": model_digest(pipe)} | _exchange(pipe)


def _configuration(job: _Job, pipe: Any) -> dict[str, Any]:
    from dite.checkpoint.diffusers_quantizer import recipe_of
    from dite.models.access import the_denoiser
    from dite.models.digest import dtype_name, model_digest
    from dite.sampling import takes_classes

    recipe = recipe_of(the_denoiser(pipe))
    left_out = {"description", "kind", "name", "dtype"} | ({"prompts"} if takes_classes(pipe) else set())
    left_out |= {key for key in ("weights", "resize", "threads") if getattr(job.settings, key, None) is None}  # of an extractor that brings its own
    return {
        "model": source_name(job.model),
        "model_sha256": model_digest(pipe),
        "recipe": recipe.name if recipe else None,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": dtype_name(pipe),
        "device": str(pipe.device),
        "protocol": job.settings.name,
        "overrides": job.changed,
        **job.settings.model_dump(exclude=left_out),
        **_exchange(pipe),
    }


def _exchange(pipe: Any) -> dict[str, Any]:
    """How the pipeline is shared out over ranks, where it is."""
    from dite.models.access import the_denoiser

    exchange = getattr(the_denoiser(pipe), "dite_exchange", None)
    return {} if exchange is None else {"exchange": exchange}


def source_name(source: Any) -> str:
    """How a report calls a model: the source as given, or the class of a pipeline."""
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__} in memory"


def _names(pipe: Any) -> dict[int, str]:
    from dite.sampling import class_names

    return class_names(pipe)


def _stack(images: list) -> Any:
    import torch

    return torch.stack(images)


def _silent(_stage: str, _done: int, _total: int) -> None:
    pass
