"""Sampling that can be repeated: image i is a pure function of its seed, its condition, the settings and its row.

Floating-point matrix products round differently at different batch sizes (87% of a DiT's fp32 outputs differ in the last bits between a
batch of 7 and one of 50), so batches never vary: sample i is always row `i mod micro_batch` of a micro-batch of exactly `micro_batch`
rows, the last of which is padded. Its noise comes from its own CPU generator. Neither its neighbours, nor how many samples were asked for,
nor where an interrupted run went on can therefore change it.

Shapes: B rows of a micro-batch, C channels, H × W pixels; latents have the pipeline's own shape.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dite.errors import NonFiniteOutput, UnsupportedModel, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

Condition = int | str
Progress = Callable[[int, int], None]
SEEDS = 2**32  # torch's CPU generator uses the low 32 bits of a seed only


@dataclass(frozen=True)
class SampleSettings:
    """`num_steps` sampler iterations with classifier-free `guidance` (1 switches it off), in batches of `micro_batch` rows."""

    num_steps: int = 50
    guidance: float = 4.0
    micro_batch: int = 8

    def __post_init__(self):
        if self.num_steps < 1 or self.micro_batch < 1 or not 0 <= self.guidance < float("inf"):
            raise UsageError(
                "these settings can't be sampled",
                f"num_steps {self.num_steps} and micro_batch {self.micro_batch} must be at least 1, guidance {self.guidance} finite and not negative",
                "for example num_steps=50, guidance=4.0, micro_batch=8",
            )


@dataclass(frozen=True)
class Sample:
    """One image uint8 [3, H, W], its final latent fp32, and with `trajectory=True` the fp32 latents after each step; all on the CPU."""

    index: int
    seed: int
    condition: Condition
    image: torch.Tensor
    latent: torch.Tensor
    trajectory: list[torch.Tensor] | None = None


def sample(
    pipe: Any,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    settings: SampleSettings | None = None,
    *,
    progress: Progress | None = None,
    trajectory: bool = False,
) -> Iterator[Sample]:
    """Yield one `Sample` per (condition, seed), in order.

    `pipe` is a diffusers pipeline or a `dite.Pipeline`; conditions are class ids or names for class-conditional pipelines, prompts for the
    others. `progress(done, total)` counts sampler iterations over all micro-batches. The pipeline is left as it was found.

    Raises UsageError for conditions the model doesn't have, UnsupportedModel for pipelines whose result isn't one image per condition or
    depends on more than the seed, NonFiniteOutput for NaN and infinity.
    """
    settings = settings or SampleSettings()
    if len(conditions) != len(seeds):
        raise UsageError(
            "conditions and seeds don't pair up", f"{len(conditions)} conditions, {len(seeds)} seeds", "give one seed for each condition"
        )
    pipe = unwrap(pipe)
    most = getattr(getattr(pipe.scheduler, "config", None), "num_train_timesteps", None)
    if most is not None and settings.num_steps > most:
        raise UsageError(
            f"{settings.num_steps} steps are too many", f"{type(pipe.scheduler).__name__} was made for at most {most}", "use fewer steps"
        )
    wrong = next((seed for seed in seeds if not 0 <= seed < SEEDS), None)
    if wrong is not None:
        raise UsageError(f"seed {wrong} can't be used", f"torch's generator tells the seeds 0 to {SEEDS - 1} apart", "choose a smaller one")
    return _sample(pipe, resolve_conditions(pipe, conditions), [int(seed) for seed in seeds], settings, progress, trajectory)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` in a run seeded with `seed`: distinct within a run, and runs with neighbouring seeds lie far apart.

    >>> [sample_seed(0, i) for i in range(3)], sample_seed(1, 0)
    ([0, 1, 2], 2654435761)
    """
    return (seed * 2654435761 + index) % SEEDS


def unwrap(pipe: Any) -> Any:
    """The diffusers pipeline inside a `dite.Pipeline`; anything else that isn't a pipeline is refused."""
    from diffusers import DiffusionPipeline

    from dite.models import access

    inner = access.unwrap(pipe)
    if not isinstance(inner, DiffusionPipeline):
        raise UnsupportedModel(
            f"sampling needs a whole diffusers pipeline with scheduler and decoder, this is a {type(inner).__name__}",
            "put the model into its pipeline first, as in DiTPipeline(transformer=model, vae=..., scheduler=...)",
        )
    return inner


def takes_classes(pipe: Any) -> bool:
    """Whether the pipeline is conditioned on class ids (else on prompts)."""
    return "class_labels" in call_parameters(unwrap(pipe))


def class_names(pipe: Any) -> dict[int, str]:
    """Class id → one of its names, in order of the ids. Empty when the pipeline holds no `id2label`."""
    names: dict[int, str] = {}
    for name, number in getattr(unwrap(pipe), "labels", {}).items():
        names.setdefault(number, name)
    return dict(sorted(names.items()))


def class_ids(pipe: Any) -> list[int]:
    """Every class id that the model was trained on, ascending; without `id2label`, every id its embedding has."""
    pipe = unwrap(pipe)
    return list(class_names(pipe)) or list(range(pipe.transformer.config.num_embeds_ada_norm))


def resolve_conditions(pipe: Any, values: Sequence[Condition]) -> list[Condition]:
    """Class ids for class-conditional pipelines (`values` are ids, decimal strings or names), the prompts as they are for the others.

    Raises UsageError with the nearest name for one the model doesn't have.
    """
    pipe = unwrap(pipe)
    if takes_classes(pipe):
        return [_class_id(pipe, value) for value in values]
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is no prompt", f"{type(pipe).__name__} is conditioned on text", "give a prompt in words")
    return list(values)


def _class_id(pipe: Any, value: Condition) -> int:
    labels = getattr(pipe, "labels", {})
    folded = {name.casefold(): number for name, number in labels.items()}
    if isinstance(value, str) and value.strip().casefold() in folded:
        return folded[value.strip().casefold()]
    known = class_ids(pipe)
    text = str(value).strip()
    if text.isascii() and text.isdigit() and not isinstance(value, bool):
        if int(text) in set(known):
            return int(text)
        raise UsageError(f"no class {text}", f"the model has {len(known)} classes, {known[0]} to {known[-1]}", "give one of those ids, or a name")
    some = ", ".join(list(class_names(pipe).values())[:10]) + (", ..." if len(known) > 10 else "")
    rule = f"the model's classes are {some}" if folded else f"this model has no class names, only ids {known[0]} to {known[-1]}"
    raise UsageError(f"no class {text!r}", rule, did_you_mean(text.casefold(), folded, cutoff=0.5) or "give a name or an id from that list")


def _sample(
    pipe: Any, conditions: list[Condition], seeds: list[int], settings: SampleSettings, progress: Progress | None, trajectory: bool
) -> Iterator[Sample]:
    rows = settings.micro_batch
    starts = range(0, len(conditions), rows)
    for number, start in enumerate(starts):
        stop = min(start + rows, len(conditions))
        padded = [min(row, stop - 1) for row in range(start, start + rows)]
        recorder = Recorder(rows, keep=trajectory)
        if progress:
            recorder.on_step = lambda step, number=number: progress(
                min(number * settings.num_steps + step, (number + 1) * settings.num_steps), len(starts) * settings.num_steps
            )
        images = draw(pipe, [conditions[row] for row in padded], [seeds[row] for row in padded], settings, recorder)
        for row, index in enumerate(range(start, stop)):
            steps = [latents[row].clone() for latents in recorder.trajectory] if trajectory else None
            yield Sample(index, seeds[index], conditions[index], images[row], recorder.latents[row].clone(), steps)


def draw(pipe: Any, conditions: list[Condition], seeds: list[int], settings: SampleSettings, recorder: Recorder, **arguments: Any) -> torch.Tensor:
    """One micro-batch through the pipeline; images uint8 [B, 3, H, W] on the CPU. `arguments` are further ones of the pipeline's own.

    Raises UnsupportedModel and NonFiniteOutput as `sample` does.
    """
    import torch

    parameters = call_parameters(pipe)
    arguments["class_labels" if "class_labels" in parameters else "prompt"] = conditions
    if "guidance_scale" in parameters:
        arguments["guidance_scale"] = settings.guidance
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    before = _global_generators(pipe)
    with _quiet(pipe), _recorded(pipe, recorder), _float32_noise(pipe), torch.no_grad():
        output = pipe(**arguments, num_inference_steps=settings.num_steps, generator=generators, output_type="pt")
    if any(not torch.equal(*pair) for pair in zip(before, _global_generators(pipe), strict=True)):
        raise UnsupportedModel(
            f"sampling with {type(pipe.scheduler).__name__} drew from torch's global generator, so images don't depend on their seeds alone",
            "use a deterministic sampler such as DDIMScheduler, and call .eval() on the models",
        )
    images = _channels_first(getattr(output, "images", None))
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or len(images) != len(conditions) or images.shape[1] != 3:
        raise UnsupportedModel(
            f"{type(pipe).__name__} gives {_describe(images)}, not one RGB image for each of {len(conditions)} conditions",
            "use a pipeline that makes images",
        )
    if recorder.latents is None:
        raise UnsupportedModel(
            f"{type(pipe).__name__} never called scheduler.step, so its latents can't be recorded", "use a pipeline that owns its scheduler"
        )
    if not torch.isfinite(images).all():
        raise NonFiniteOutput("an image is not finite", "its latents are, but the decoder returned NaN or infinity", "load the pipeline in float32")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _channels_first(images: Any) -> Any:
    """[B, 3, H, W], also where DiTPipeline gives NumPy's [B, H, W, 3] whatever it was asked for (diffusers 0.36)."""
    import numpy
    import torch

    if isinstance(images, numpy.ndarray) and images.ndim == 4:
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    return images


class Recorder:
    """Keeps the latents that `scheduler.step` returns: the last ones, or all of them.

    With guidance, DiTPipeline doubles the batch before the scheduler: the first `rows` are the samples, the others their shadows. `preview` is what
    the scheduler expects the last latents to be, where it says so, else what they are now.
    """

    def __init__(self, rows: int, keep: bool):
        self.rows = rows
        self.keep = keep
        self.latents: torch.Tensor | None = None
        self.preview: torch.Tensor | None = None
        self.trajectory: list[torch.Tensor] = []
        self.steps = 0
        self.on_step: Callable[[int], None] | None = None

    def record(self, result: Any) -> None:
        import torch

        previous = result[0] if isinstance(result, tuple) else result.prev_sample
        foreseen = None if isinstance(result, tuple) else getattr(result, "pred_original_sample", None)
        self.preview = previous if foreseen is None else foreseen
        self.latents = previous[: self.rows].detach().float().cpu()
        self.steps += 1
        finite = torch.isfinite(self.latents).flatten(1).all(1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise NonFiniteOutput(
                "the model's output is not finite",
                f"row {bad} of the micro-batch holds NaN or infinity after step {self.steps}",
                "try --dtype float32, or a recipe with more bits",
            )
        if self.keep:
            self.trajectory.append(self.latents)
        if self.on_step:
            self.on_step(self.steps)


@contextmanager
def _recorded(pipe: Any, recorder: Recorder) -> Iterator[None]:
    """Wrap `pipe.scheduler.step` on the instance (DiTPipeline offers no callback) and put it back whatever happens."""
    scheduler = pipe.scheduler
    own = vars(scheduler).get("step")
    step = scheduler.step

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        recorder.record(result)
        return result

    # Pipelines read the signature of `step` to learn whether it takes eta or a generator.
    recording.__signature__ = inspect.signature(step)
    scheduler.step = recording
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No diffusers progress bar; the caller's setting comes back afterwards."""
    missing = object()
    before = getattr(pipe, "_progress_bar_config", missing)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is missing:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


_patching = threading.Lock()
_patched: dict[Any, int] = {}  # module → how many samplers need it patched


@contextmanager
def _float32_noise(pipe: Any) -> Iterator[None]:
    """Let the pipeline draw its noise in float32 and round it, so that a seed means one image at every precision.

    Before torch 2.13 a generator gives bfloat16 other numbers than float32. Pipelines offer no argument for it (DiTPipeline takes no latents), so
    `randn_tensor` is replaced in the modules of the pipeline's classes while any thread samples.
    """
    from diffusers.utils.torch_utils import randn_tensor

    def in_float32(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> torch.Tensor:
        import torch

        narrow = dtype in (torch.float16, torch.bfloat16)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32 if narrow else dtype, layout=layout)
        return noise.to(dtype) if narrow else noise

    modules = {sys.modules[base.__module__] for base in type(pipe).__mro__ if hasattr(sys.modules.get(base.__module__), "randn_tensor")}
    with _patching:
        for module in modules:
            _patched[module] = _patched.get(module, 0) + 1
            module.randn_tensor = in_float32
    try:
        yield
    finally:
        with _patching:
            for module in modules:
                _patched[module] -= 1
                if not _patched[module]:
                    module.randn_tensor = randn_tensor


def _global_generators(pipe: Any) -> list[torch.Tensor]:
    import torch

    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(pipe.device)] if pipe.device.type == "cuda" else [])


def call_parameters(pipe: Any) -> set[str]:
    """Names of what the pipeline takes when it is called."""
    return set(inspect.signature(type(pipe).__call__).parameters)


def _describe(images: Any) -> str:
    return f"a tensor of shape {list(images.shape)}" if hasattr(images, "shape") else f"a {type(images).__name__}"
