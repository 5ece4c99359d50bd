"""Paired fidelity: the same seeds and conditions through two models, compared sample by sample.

    PSNR = 10 log10(255² / MSE) dB          per image, capped: identical images count as 100 dB
    latent relative error = ‖a − b‖ / ‖b‖   per sample, b the baseline; after the last step, and after each step

Shapes: N samples, S steps, H × W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dite.errors import DiteError, UsageError
from dite_evals.backend import torchmetrics
from dite_evals.intervals import LEVEL, student

if TYPE_CHECKING:
    from dite.sampling import Sample

PSNR_CAP_DB = 100.0
SSIM_WINDOW_PX = 11


@dataclass
class PairedFidelity:
    """Accumulates pairs; `metrics()` sums them up. Only images and error figures are kept, no trajectories."""

    images: list[torch.Tensor] = field(default_factory=list)
    baseline_images: list[torch.Tensor] = field(default_factory=list)
    latent_errors: list[float] = field(default_factory=list)
    step_errors: list[list[float]] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)

    def add(self, quantized: Sample, baseline: Sample) -> None:
        """Add one pair, sampled with `trajectory=True`. Raises DiteError when the two can't be a pair."""
        if (quantized.seed, quantized.condition) != (baseline.seed, baseline.condition):
            raise DiteError(
                "samples don't pair up", f"seed and condition {quantized.seed, quantized.condition} against {baseline.seed, baseline.condition}"
            )
        if quantized.image.shape != baseline.image.shape or quantized.latent.shape != baseline.latent.shape:
            raise UsageError(
                "the two models can't be compared",
                f"one makes images {list(quantized.image.shape)} of latents {list(quantized.latent.shape)}, "
                f"the other {list(baseline.image.shape)} of {list(baseline.latent.shape)}",
                "give the model's own full-precision original as --baseline",
            )
        if len(quantized.trajectory or []) != len(baseline.trajectory or []):
            raise UsageError(
                "the two models can't be compared step by step",
                f"their samplers made {len(quantized.trajectory or [])} and {len(baseline.trajectory or [])} steps",
                "use the same scheduler for both",
            )
        self.images.append(quantized.image)
        self.baseline_images.append(baseline.image)
        self.latent_errors.append(relative_error(quantized.latent, baseline.latent))
        self.step_errors.append([relative_error(a, b) for a, b in zip(quantized.trajectory or [], baseline.trajectory or [], strict=True)])
        self.labels.append({"seed": quantized.seed, "condition": quantized.condition})

    def metrics(self) -> dict[str, Any]:
        """`n, psnr: {mean, p05, interval}, ssim, latent_relative_error, per_step_error` over all pairs."""
        if not self.images:
            raise UsageError("nothing to compare", "n is 0", "compare at least one sample")
        quantized, baseline = torch.stack(self.images), torch.stack(self.baseline_images)
        values = psnr(quantized, baseline)
        return {
            "n": len(values),
            "psnr": {"mean": values.mean().item(), "p05": torch.quantile(values, 0.05).item(), "interval": mean_interval(values)},
            "ssim": ssim(quantized, baseline).mean().item(),
            "latent_relative_error": sum(self.latent_errors) / len(self.latent_errors),
            "per_step_error": torch.tensor(self.step_errors, dtype=torch.float64).mean(0).tolist(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One dict a sample: `index, seed, condition, psnr, latent_relative_error`, in order of the index."""
        values = psnr(torch.stack(self.images), torch.stack(self.baseline_images)).tolist()
        return [
            {"index": index, **label, "psnr": value, "latent_relative_error": error}
            for index, (label, value, error) in enumerate(zip(self.labels, values, self.latent_errors, strict=True))
        ]


def psnr(images: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, fp64 [N], of uint8 [N, 3, H, W]; at most `PSNR_CAP_DB`."""
    functional = torchmetrics("functional.image")
    values = functional.peak_signal_noise_ratio(images.double(), baseline.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=PSNR_CAP_DB)


def ssim(images: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Structural similarity [N] of uint8 [N, 3, H, W] (Wang et al. 2004: Gaussian window of 11 pixels, σ 1.5)."""
    if min(images.shape[-2:]) < SSIM_WINDOW_PX:
        raise UsageError(
            "images are too small for SSIM", f"{images.shape[-2]}×{images.shape[-1]} pixels, the window has {SSIM_WINDOW_PX}", "compare larger images"
        )
    functional = torchmetrics("functional.image")
    batches = zip(images.split(64), baseline.split(64), strict=True)
    values = [
        functional.structural_similarity_index_measure(a.float(), b.float(), data_range=255.0, reduction="none").reshape(-1) for a, b in batches
    ]
    return torch.cat(values).double()


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in fp64; 0 for two zeros, infinity when only the reference is zero."""
    distance = torch.linalg.vector_norm(value.double() - reference.double()).item()
    norm = torch.linalg.vector_norm(reference.double()).item()
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / norm


def mean_interval(values: torch.Tensor) -> list[float]:
    """95% interval of the mean of `values` [N] by Student's t; the mean itself, twice, for one value."""
    mean = values.double().mean().item()
    if len(values) < 2:
        return [mean, mean]
    half = student(LEVEL, len(values) - 1) * values.double().std().item() / math.sqrt(len(values))
    return [mean - half, mean + half]
