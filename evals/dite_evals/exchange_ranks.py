"""What one rank of the exchange bench does: every candidate draws the same short trajectory, round after round, and tells what each step took.

    python -m dite_evals.exchange_ranks SETTINGS.json          with RANK, WORLD_SIZE and DITE_RENDEZVOUS in the environment

Rank 0 talks to who started it in lines of JSON on stdout; before each link it asks for it, and waits for a line on stdin. One device is rank 0 alone,
while the others sleep.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dite.models.access import the_denoiser
from dite.models.families import example_inputs
from dite.parallel.group import RankGroup
from dite.parallel.handle import parallelize
from dite.parallel.probe import measure
from dite_evals.fidelity import relative_error
from dite_evals.speed import batched

ONE_DEVICE = "one_device"
GUIDANCE = 4.0
PR_SET_PDEATHSIG = 1


@dataclass
class Settings:
    """`model`: what `dite.load` takes, or {"size", "tokens", "layers"} of a random one. `candidates`: [mode, codec, order]; `links`: names, for which
    rank 0 asks. A batch of 2 of a class-conditional model is both branches of guidance."""

    model: Any
    batch_size: int
    steps: int
    rounds: int
    candidates: list[tuple[str, str, int]]
    links: list[str]
    seed: int = 0
    timeout_s: float = 120.0


@dataclass
class Run:
    """One trajectory: seconds and bytes of each step, seconds waited in each, and the final latent."""

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    latent: torch.Tensor | None = None


class Sampler:
    """A diffusers scheduler's loop around a bare transformer, always from the same start."""

    def __init__(self, pipe: Any, settings: Settings):
        from diffusers import DDIMScheduler

        self.model = the_denoiser(pipe)
        self.scheduler = getattr(pipe, "scheduler", None) or DDIMScheduler()
        self.steps = settings.steps
        self.inputs = batched(dict(example_inputs(self.model)), settings.batch_size)
        shape = self.inputs["hidden_states"].shape
        labels = self.inputs.get("class_labels")
        self.guided = labels is not None and settings.batch_size == 2
        self.start = torch.randn(1 if self.guided else shape[0], *shape[1:], generator=torch.Generator().manual_seed(settings.seed))
        if self.guided:
            self.inputs["class_labels"] = torch.tensor([1, self.model.config.num_embeds_ada_norm])

    @torch.no_grad()
    def run(self, stats: Any) -> Run:
        """`stats()` gives the handle's counters, or None."""
        self.scheduler.set_timesteps(self.steps)
        run, x = Run(), self.start * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            before, begin = stats(), time.perf_counter()
            out = self._predicted(x, t)
            run.seconds.append(time.perf_counter() - begin)
            after = stats()
            run.sent.append(after["bytes_sent"] - before["bytes_sent"])
            run.waited.append(after["seconds_waited"] - before["seconds_waited"])
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        run.latent = x
        return run

    def _predicted(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given = torch.cat([x, x]) if self.guided else x
        timestep = t.expand(len(given)) if self.inputs["timestep"].ndim else t
        out = self.model(**self.inputs | {"hidden_states": given.to(self.inputs["hidden_states"].dtype), "timestep": timestep})[0].float()
        out = out[:, : x.shape[1]]  # some predict their variance too
        if not self.guided:
            return out
        conditional, null = out.chunk(2)
        return null + GUIDANCE * (conditional - null)


def work(settings: Settings) -> None:
    """All rounds of one rank."""
    pipe = _model(settings.model)
    sampler = Sampler(pipe, settings)
    world = int(os.environ["WORLD_SIZE"])
    group = RankGroup.join(world, timeout_s=settings.timeout_s)
    order, draw = [tuple(one) for one in settings.candidates], random.Random(settings.seed)
    exact = None
    for turn in range(settings.rounds):
        for link in settings.links:
            _ask(group, {"link": link})
            if turn == 0 or turn == settings.rounds - 1:
                found = measure(sampler.model, _call_inputs(sampler), group)
                _tell(group, {"probe": {"round": turn, "link": link, **_probed(found)}})
            draw.shuffle(order)
            for candidate in [(ONE_DEVICE, "none", 0), *order]:
                run = _trajectory(sampler, candidate, group, settings)
                if candidate[0] == ONE_DEVICE and run is not None:
                    exact = run.latent
                everyone = group.gather_json(None if run is None else [run.seconds, run.waited, run.sent])
                if group.rank == 0:
                    _tell(group, {"run": _joined(candidate, link, turn, everyone) | {"latent_relative_error": relative_error(run.latent, exact)}})
    group.close()


def _trajectory(sampler: Sampler, candidate: tuple[str, str, int], group: RankGroup, settings: Settings) -> Run | None:
    mode, codec, order = candidate
    if mode == ONE_DEVICE:
        nothing = {"bytes_sent": 0, "seconds_waited": 0.0}
        run = sampler.run(lambda: nothing) if group.rank == 0 else None
        group.barrier()
        return run
    with parallelize(sampler.model, group.size, mode, codec, order=order, probe=False, timeout_s=settings.timeout_s) as par:
        par.group.barrier()
        return sampler.run(par.stats)


def _joined(candidate: tuple[str, str, int], link: str, turn: int, everyone: list[Any]) -> dict[str, Any]:
    """What all ranks tell of a trajectory: a step takes as long as on the slowest, and sends what the busiest sends."""
    ranks = [one for one in everyone if one is not None]
    seconds, waited, sent = ([list(column) for column in zip(*(one[at] for one in ranks), strict=True)] for at in range(3))
    slowest = [step.index(max(step)) for step in seconds]
    return {
        "candidate": list(candidate),
        "link": link,
        "round": turn,
        "seconds": [max(step) for step in seconds],
        "waited": [step[at] for step, at in zip(waited, slowest, strict=True)],
        "sent": [max(step) for step in sent],
        "sent_in_all": max(sum(step[rank] for step in sent) for rank in range(len(ranks))),
    }


def _probed(found: tuple[Any, Any, Mapping[str, Any]]) -> dict[str, Any]:
    workload, link, speeds = found
    return {"workload": asdict(workload), "measured_link": asdict(link), "speeds": {name: asdict(speed) for name, speed in speeds.items()}}


def _call_inputs(sampler: Sampler) -> dict[str, Any]:
    return sampler.inputs | {"timestep": torch.full((len(sampler.inputs["hidden_states"]),), 500)}


def _model(model: Any) -> Any:
    if isinstance(model, str):
        from dite.models.load import load_pipeline

        return load_pipeline(model, dtype="bfloat16", device="cpu")
    from dite_evals.random_models import random_dit, size_of

    return random_dit(size_of(model["size"], model["tokens"]) | model.get("changes", {}), model["layers"])


def _ask(group: RankGroup, question: dict[str, Any]) -> None:
    """Rank 0 asks and waits for a line; then all go on."""
    if group.rank == 0:
        _tell(group, {"ask": question})
        if not sys.stdin.readline():
            raise SystemExit("who started the ranks is gone")
    group.barrier()


def _tell(group: RankGroup, document: dict[str, Any]) -> None:
    if group.rank == 0:
        print(json.dumps(document), flush=True)


def main() -> None:
    """This process is one rank."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ranks never outlive who started them, however that ends
    torch.set_num_threads(1)
    work(Settings(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
