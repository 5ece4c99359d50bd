"""How far a quantized model strays: what a search minimises. Both fitnesses run the whole pipeline as it stands, and count sample-forwards.

`Trajectories` (`fitness: surrogate`) samples a few short trajectories from fixed noise and compares the final latents with full precision's. A
denoiser's error on cached inputs, the more usual proxy, weighs errors alike that cancel from step to step (rounded activations) and that add up
(rounded weights): on the built-in model it is off by a factor of 3 between W8A8 and W4A8. Trajectories see what the sampler makes of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dite.sampling import NonFiniteOutput, SampleSettings, sample, sample_seed

SEED_OFFSET = 2_000_003  # neither the seeds of calibration nor those of evaluations


class Trajectories:
    """√ mean ‖x − x̂‖² / ‖x‖² over the final latents x of one trajectory of `num_steps` steps for each of `conditions`; inf if one fails."""

    def __init__(self, pipe: Any, conditions: Sequence[Any], num_steps: int, guidance: float, seed: int):
        self.pipe = pipe
        self.conditions = list(conditions)
        self.seeds = [sample_seed(SEED_OFFSET + seed, index) for index in range(len(conditions))]
        self.settings = SampleSettings(num_steps, guidance, micro_batch=len(conditions))
        self.forwards = len(conditions) * num_steps * 2  # with and without the condition
        self.baseline = self._latents()

    def __call__(self) -> float:
        try:
            pairs = list(zip(self._latents(), self.baseline, strict=True))
        except NonFiniteOutput:
            return math.inf
        errors = [float((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)) for found, wanted in pairs]
        return math.sqrt(sum(errors) / len(errors))

    def _latents(self) -> list:
        return [one.latent for one in sample(self.pipe, self.conditions, self.seeds, self.settings)]


class Fid:
    """The paper's fitness: `measure()` is the FID of some images. Slow, and noisier than most of what it has to tell apart."""

    def __init__(self, measure: Callable[[], float], forwards: int):
        self.measure, self.forwards = measure, forwards

    def __call__(self) -> float:
        return self.measure()
