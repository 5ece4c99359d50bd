"""How often does a metric's interval hold the truth? Gaussian features, whose distances are known: written to docs/results/interval-coverage.json.

    python evals/interval_coverage.py [--repetitions 900] [--out FILE]

Every case draws N samples of one model over and over against one fixed reference. A row counts how often the 90% and the 95% interval held a truth:
`this n` is the metric at this N (the mean over all runs), `population` the metric for N → ∞, in closed form. `error_ratio` is the mean standard
error divided by the deviation between the runs: below 1 the intervals are too narrow. `within` is the 95% error of a counted share. Rows whose N is
too small are there to show what is refused without `force`. An interrupted run goes on with the next case: `done` of `cases`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dite_evals.fid import estimate_fid
from dite_evals.fid_infinity import estimate_fid_infinity
from dite_evals.frechet import Moments, Reference, frechet_distance, moments
from dite_evals.intervals import Estimate, difference, subsample
from dite_evals.kernel import cmmd, kid
from dite_evals.manifold import precision_recall
from dite_evals.report import environment
from dite_evals.score import inception_score

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (0.9, 0.95)
ENDLESS = 10**9
FIRST_SEED = 1000  # clear of the seeds of the worlds, which are their numbers of features
CLASSES = 10
ALIKE, UNLIKE = 0.15, 0.5

Run = Callable[["World", torch.Generator], dict[str, Estimate]]


@dataclass(frozen=True)
class World:
    """x = mu + z · mixing with z standard normal [N, F]; `reference` and `other`, a second model, are of the same kind."""

    n: int
    mu: torch.Tensor
    mixing: torch.Tensor
    other_mixing: torch.Tensor
    reference: Moments
    reference_features: torch.Tensor

    @staticmethod
    def of(num_features: int, n: int, distance: float) -> World:
        """Variances fall like 1/i^½, as features' do; the model is off by `distance` in mean and mixing, the second model a little more."""
        generator = torch.Generator().manual_seed(num_features)
        spectrum = torch.arange(1, num_features + 1, dtype=torch.float64) ** -0.25
        plain = torch.linalg.qr(_normal(num_features, num_features, generator))[0] * spectrum[:, None]
        away, further = (_normal(num_features, num_features, generator) / math.sqrt(num_features) for _ in range(2))
        mu = distance * _normal(1, num_features, generator)[0] / math.sqrt(num_features)
        reference = Moments(torch.zeros_like(mu), plain.T @ plain, ENDLESS)
        mixing = plain + distance * away
        return World(n, mu, mixing, mixing + 0.1 * further, reference, _normal(1000, num_features, generator) @ plain)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        return self.mu + _normal(self.n, len(self.mu), generator) @ self.mixing

    def population(self, mixing: torch.Tensor | None = None) -> Moments:
        mixing = self.mixing if mixing is None else mixing
        return Moments(self.mu, mixing.T @ mixing, ENDLESS)

    def fid(self) -> float:
        return frechet_distance(self.population(), self.reference)

    def fid_difference(self) -> float:
        return frechet_distance(self.population(self.other_mixing), self.reference) - self.fid()

    def kid(self) -> float:
        """Expectation over x of the unbiased MMD² from `reference_features`: Gaussian moments up to the third."""
        f, y, mu, sigma = len(self.mu), self.reference_features, self.mu, self.population().sigma
        second = sigma + torch.outer(mu, mu)
        third = torch.einsum("i,j,k->ijk", mu, mu, mu)
        third = third + sum(torch.einsum(f"{a},{b}->ijk", mu, sigma) for a, b in (("i", "jk"), ("j", "ik"), ("k", "ij")))
        within = 1 + 3 * (mu @ mu) / f + 3 * second.square().sum() / f**2 + third.square().sum() / f**3
        mean, variance = y @ mu / f, ((y @ sigma) * y).sum(1) / f**2
        across = 1 + 3 * mean + 3 * (mean**2 + variance) + mean**3 + 3 * mean * variance
        kernel = (y @ y.T / f + 1) ** 3
        reference = (kernel.sum() - kernel.diagonal().sum()) / (len(y) * (len(y) - 1))
        return (within - 2 * across.mean() + reference).item()


def fid_run(world: World, generator: torch.Generator, infinity: bool, parts: bool = False) -> dict[str, Estimate]:
    x, reference = world.draw(generator), Reference(world.reference)
    found = {"fid, jackknife": estimate_fid(x, reference, force=True)}
    found["fid corrected, jackknife"] = found["fid, jackknife"].corrected()
    if infinity:
        found["fid∞ by a line, jackknife"] = estimate_fid_infinity(x, reference, force=True)
    if parts:
        found["fid, 100 halves"] = subsample(lambda part: reference.distance(moments(part)), x)
        found["fid corrected, 100 halves"] = found["fid, 100 halves"].corrected()
    return found


def paired_run(world: World, generator: torch.Generator) -> dict[str, Estimate]:
    """Two models, of the same noise and of noises of their own."""
    noise, reference = _normal(world.n, len(world.mu), generator), Reference(world.reference)
    first = estimate_fid(world.mu + noise @ world.mixing, reference)
    second = estimate_fid(world.mu + noise @ world.other_mixing, reference)
    alone = estimate_fid(world.mu + _normal(world.n, len(world.mu), generator) @ world.other_mixing, reference)
    return {
        "fid difference, same seeds": difference(second, first),
        "fid difference corrected, same seeds": difference(second.corrected(), first.corrected()),
        "fid difference, other seeds": difference(alone, first),
    }


def kid_run(world: World, generator: torch.Generator) -> dict[str, Estimate]:
    return {"kid, jackknife": kid(world.draw(generator), world.reference_features)}


def cmmd_run(world: World, generator: torch.Generator) -> dict[str, Estimate]:
    x, y = world.draw(generator) + 1, world.reference_features + 1  # embeddings share a direction
    return {"cmmd, jackknife": cmmd(x, y)}


def manifold_run(world: World, generator: torch.Generator) -> dict[str, Estimate]:
    found = precision_recall(world.draw(generator), world.reference_features)
    return {"precision, jackknife": found.precision, "recall, jackknife": found.recall}


def score_run(world: World, generator: torch.Generator) -> dict[str, Estimate]:
    logits = 3 * world.draw(generator)[:, :CLASSES]
    return {"inception score, 10 splits": inception_score(logits), "inception score, 1 split": inception_score(logits, splits=1)}


def cases() -> list[tuple[World, float, Run, dict[str, float]]]:
    """(world, its distance, what to run, truths by the beginning of a row's name)."""
    found: list[tuple[World, float, Run, dict[str, float]]] = []
    fids = [(16, 500, UNLIKE), (16, 500, 0.0), (64, 2000, ALIKE), (64, 500, UNLIKE), (64, 5000, UNLIKE), (64, 130, UNLIKE), (64, 70, UNLIKE)]
    for num_features, n, distance in fids:
        world = World.of(num_features, n, distance)
        run = partial(fid_run, infinity=100 < n < 5000, parts=(n, distance) == (500, UNLIKE) and num_features == 16)
        found.append((world, distance, run, {"fid": world.fid()}))
    for num_features, n in [(16, 500), (64, 2000)]:
        world = World.of(num_features, n, UNLIKE)
        found.append((world, UNLIKE, paired_run, {"fid difference": world.fid_difference()}))
    for num_features, n, distance in [(16, 500, UNLIKE), (64, 1000, ALIKE), (64, 500, 0.0)]:
        world = World.of(num_features, n, distance)
        found += [(world, distance, kid_run, {"kid": world.kid()}), (world, distance, cmmd_run, {})]
    for num_features, n, distance in [(16, 500, UNLIKE), (64, 1000, ALIKE), (64, 300, UNLIKE)]:
        world = World.of(num_features, n, distance)
        found += [(world, distance, manifold_run, {}), (world, distance, score_run, {})]
    return found


def measure(world: World, distance: float, run: Run, truths: dict[str, float], repetitions: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    runs = [run(world, torch.Generator().manual_seed(seed)) for seed in range(FIRST_SEED, FIRST_SEED + repetitions)]
    rows = []
    for name in runs[0]:
        estimates = [one[name] for one in runs]
        values = torch.tensor([one.value for one in estimates], dtype=torch.float64)
        errors = torch.tensor([one.error for one in estimates], dtype=torch.float64)
        known = next((truth for start, truth in truths.items() if name.startswith(start)), None)
        row: dict[str, Any] = {"interval": name, "features": len(world.mu), "n": world.n, "off_by": distance, "repetitions": repetitions}
        if not ("corrected" in name or "∞" in name):
            row["this n"] = {"value": values.mean().item(), **coverage(estimates, values.mean().item())}
        if known is not None:
            row["population"] = {"value": known, **coverage(estimates, known)}
        row |= {"deviation": values.std().item(), "error_ratio": (errors.mean() / values.std()).item()}
        rows.append(row)
    return rows


def coverage(estimates: list[Estimate], truth: float) -> dict[str, float]:
    """The share of intervals that hold `truth`, by level."""
    return {
        f"{level:.0%}": sum(low <= truth <= high for low, high in (one.at(level).interval for one in estimates)) / len(estimates) for level in LEVELS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=900)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/interval-coverage.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    within = {f"{level:.0%}": 1.96 * math.sqrt(level * (1 - level) / options.repetitions) for level in LEVELS}
    command = f"python evals/interval_coverage.py --repetitions {options.repetitions}"
    document = {"command": command, "what": __doc__.splitlines()[0], "environment": environment(), "within": within, "done": 0, "rows": rows}
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if (found["command"], found["environment"]) == (command, document["environment"]):
            document, rows = found, found["rows"]
    everything = cases()
    document["cases"] = len(everything)
    for case in everything[document["done"] :]:
        new = measure(*case, options.repetitions)
        rows += new
        document["done"] += 1
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in new), f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


if __name__ == "__main__":
    main()
