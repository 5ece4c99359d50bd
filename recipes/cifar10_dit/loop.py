"""One training loop for all three stages: resumable, seeded, with a moving average of the weights.

A step depends on nothing but (seed, step): the order of the samples is a permutation drawn from (seed, epoch), and all noise comes from a
generator seeded by (seed, step). A resumed run therefore repeats what an uninterrupted one would have done, and a checkpoint holds tensors
and a step number, no random state. The learning rate is constant after its warm-up and falls linearly to zero over the last `decay` of the
run, so that raising `epochs` later continues from an old checkpoint without a second warm-up.

Under torchrun, ranks split each batch and average gradients. On a shared CPU, two ranks of one thread each beat one process of two threads by
far: a thread that is preempted stalls its partner at every operation, a rank only once a step.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file

CHECKPOINT_EVERY_S = 300
REPORT_EVERY_S = 15


class StageSettings(BaseModel):
    """How long and how one stage trains."""

    model_config = ConfigDict(extra="forbid")
    epochs: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    decay: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    ema: float = Field(ge=0, lt=1)


class Run(BaseModel):
    """Where and on what a stage runs."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    folder: Path
    name: str = "cifar10-dit"
    device: torch.device
    seed: int
    compile: bool = False


Loss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Preview = Callable[[Path], None]


def fit(name: str, model: torch.nn.Module, loss: Loss, num_samples: int, settings: StageSettings, run: Run, preview: Preview | None = None) -> None:
    """Train `model` in place and leave the averaged weights in it.

    `loss(indices [B] int64, generator)` returns a scalar; it is called under bf16 autocast. `run.folder/name` receives
    `checkpoint.safetensors` every five minutes and at the end; an existing one is resumed. `preview(path)` then draws `samples.png` beside it,
    with the averaged weights in `model`.
    """
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    batches = num_samples // settings.batch_size
    total = max(1, round(settings.epochs * batches))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True)
    average = {key: value.detach().clone() for key, value in parameters.items()}
    start, spent_s = _load(checkpoint, model, average, optimizer) if checkpoint.exists() else (0, 0.0)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if start and rank == 0:
        print(f"{name}: resumed at step {start} of {total}", file=sys.stderr, flush=True)

    model.train()
    began = reported = saved = time.monotonic()
    recent: list[float] = []
    order_epoch, order = -1, torch.empty(0)
    for step in range(start, total):
        epoch, batch = divmod(step, batches)
        if epoch != order_epoch:
            order_epoch, order = epoch, torch.randperm(num_samples, generator=_generator(run.seed, epoch, 1))
        indices = order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, total, settings)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            value = loss(indices[rank::world_size], _generator(run.seed, step, 2 + rank))
        value.backward()
        _average_gradients(list(parameters.values()), world_size)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [value.detach() for value in parameters.values()], 1 - decay)
        recent.append(value.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"{name}: loss is {recent[-1]} at step {step}; lower {name}.learning_rate")

        now = time.monotonic()
        if rank == 0 and (now - reported > REPORT_EVERY_S or step + 1 == total):
            done = step + 1 - start
            left_s = (now - began) / done * (total - step - 1)
            rate = done * settings.batch_size / (now - began)
            print(
                f"{name}: epoch {(step + 1) / batches:.2f} of {settings.epochs:g}, loss {sum(recent) / len(recent):.4f}, "
                f"{rate:.0f} images/s, {left_s / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
            reported, recent = now, []
        if rank == 0 and (now - saved > CHECKPOINT_EVERY_S or step + 1 == total):
            _save(checkpoint, parameters, average, optimizer, step + 1, spent_s + now - began)
            if preview is not None:
                with _averaged(model, parameters, average):
                    preview(folder / "samples.png")
            saved = now
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(average[key])
    model.eval()
    if world_size > 1:
        dist.barrier()  # the next stage reads this one's checkpoint


def hours_spent(run: Run, name: str) -> float:
    """Wall time that a stage has trained, over all its resumptions, in hours."""
    with safe_open(run.folder / name / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])["seconds"] / 3600


def load_average(checkpoint: Path, model: torch.nn.Module) -> None:
    """Put the averaged weights (and the buffers) of a checkpoint into `model`."""
    with safe_open(checkpoint, "pt") as file, torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(file.get_tensor(f"ema.{key}"))
        for key, value in _buffers(model).items():
            value.copy_(file.get_tensor(f"buffer.{key}"))
    model.eval()


@contextmanager
def _averaged(model: torch.nn.Module, parameters: dict[str, torch.Tensor], average: dict[str, torch.Tensor]) -> Iterator[None]:
    """The averaged weights in `model` for a while, in evaluation mode; the trained ones come back bit for bit."""
    trained = [value.detach().clone() for value in parameters.values()]
    with torch.no_grad():
        torch._foreach_copy_(list(parameters.values()), list(average.values()))
    model.eval()
    try:
        yield
    finally:
        model.train()
        with torch.no_grad():
            torch._foreach_copy_(list(parameters.values()), trained)


def _schedule(step: int, total: int, settings: StageSettings) -> float:
    decay_steps = max(1, round(settings.decay * total))
    return min(1.0, (step + 1) / max(1, settings.warmup_steps), (total - step) / decay_steps)


def _generator(seed: int, position: int, stream: int) -> torch.Generator:
    # torch's CPU generator looks at the low 32 bits of a seed only, so all three numbers are mixed into those.
    digest = hashlib.sha256(f"{seed} {position} {stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@torch.no_grad()
def _average_gradients(parameters: list[torch.Tensor], world_size: int) -> None:
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list((flat / world_size).split([gradient.numel() for gradient in gradients])))


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    persistent = model.state_dict()
    return {key: value for key, value in model.named_buffers() if key in persistent}


def _save(path: Path, parameters: dict, average: dict, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    tensors = {f"model.{key}": value.detach() for key, value in parameters.items()}
    tensors |= {f"ema.{key}": value for key, value in average.items()}
    for key, value in parameters.items():
        moments = optimizer.state[value]
        tensors |= {f"m.{key}": moments["exp_avg"], f"v.{key}": moments["exp_avg_sq"]}
    temporary = path.with_suffix(".partial")
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary, {"state": json.dumps({"step": step, "seconds": seconds})})
    os.replace(temporary, path)


def _load(path: Path, model: torch.nn.Module, average: dict, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    with safe_open(path, "pt") as file, torch.no_grad():
        state = json.loads(file.metadata()["state"])
        for key, value in model.named_parameters():
            value.copy_(file.get_tensor(f"model.{key}"))
            average[key].copy_(file.get_tensor(f"ema.{key}"))
            optimizer.state[value] = {
                "step": torch.tensor(float(state["step"]), device=value.device),
                "exp_avg": file.get_tensor(f"m.{key}").to(value.device),
                "exp_avg_sq": file.get_tensor(f"v.{key}").to(value.device),
            }
    return state["step"], state["seconds"]
