"""Every metric that an extractor and a reference allow, with its interval, from the features of N samples; and of those left out, why.

    fid, sfid              need the reference's moments, of the features and of the spatial ones
    fid_infinity           the line through FID against 1/N; needs N ≥ 5 (F + 1)
    fid_corrected          FID less its bias by the jackknife, the other estimate of FID at N → ∞; needs N ≥ 2 (F + 1)
    kid, precision, recall need features of the reference; cmmd those of CLIP
    inception_score        needs class scores

The interval of `fid` is of the FID at this N. That of `fid_corrected` and of `fid_infinity` is of the FID of infinitely many samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dite.errors import UsageError
from dite_evals.extractors import Extractor
from dite_evals.fid import agree_with_torchmetrics, estimate_fid, extrapolate, size_curve
from dite_evals.fid_infinity import FEWEST, estimate_fid_infinity
from dite_evals.frechet import Reference
from dite_evals.intervals import Estimate
from dite_evals.kernel import cmmd, kid
from dite_evals.manifold import precision_recall
from dite_evals.score import inception_score
from dite_evals.statistics import Statistics

NAMES = ("fid", "fid_corrected", "fid_infinity", "sfid", "kid", "precision", "recall", "cmmd", "inception_score")


@dataclass
class Figures:
    """`estimates` by name, `left_out` reasons by name, and the `curve`: pairs (samples a block, mean FID of the blocks)."""

    estimates: dict[str, Estimate] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    features_sha256: str = ""

    def metrics(self) -> dict[str, Any]:
        """`fid, n, interval`, each other metric and its `…_interval` (None where left out), `left_out`, `features_sha256`."""
        found: dict[str, Any] = {}
        for name in NAMES:
            one = self.estimates.get(name)
            found[name] = one and one.value
            found["interval" if name == "fid" else f"{name}_interval"] = one and list(one.interval)
        return {"fid": found.pop("fid"), "n": self.estimates["fid"].n} | found | {"left_out": self.left_out, "features_sha256": self.features_sha256}

    def replicates(self) -> dict[str, Any]:
        """What a paired comparison with another model needs: each metric without each group of samples."""
        return {
            name: {"values": list(one.replicates.values), "fraction": one.replicates.fraction, "parts": one.replicates.parts}
            for name, one in self.estimates.items()
        }


def compute_figures(found: dict[str, torch.Tensor], extractor: Extractor, statistics: Statistics, force: bool = False) -> Figures:
    """All metrics of `found`: `features` [N, F], and `logits` [N, C] and `spatial` [N, S] where the extractor gives them.

    N at least 10, and more than F unless `force`. Raises UsageError, and DiteError for NaN or where torchmetrics finds another FID.
    """
    statistics.require(extractor)
    features = found["features"].double()
    reference = Reference(statistics.moments)
    figures = Figures(features_sha256=hashlib.sha256(found["features"].contiguous().numpy().tobytes()).hexdigest())
    fid = estimate_fid(features, reference, force=force)
    agree_with_torchmetrics(fid.value, features, statistics.moments)
    figures.curve = size_curve(features, reference)
    figures.estimates["fid"] = fid
    figures.estimates |= _optional(figures, "fid_corrected", lambda: _corrected(fid, features.shape[1]))
    figures.estimates |= _optional(figures, "fid_infinity", lambda: _limit(features, reference, figures.curve, force))
    if statistics.spatial is None or "spatial" not in found:
        figures.left_out["sfid"] = f"{'the reference' if 'spatial' in found else 'the extractor'} has no spatial features"
    else:
        spatial, around = found["spatial"].double(), Reference(statistics.spatial)
        figures.estimates |= _optional(figures, "sfid", lambda: estimate_fid(spatial, around, force=force))
    _of_reference_features(figures, features, extractor, statistics)
    if "logits" in found:
        figures.estimates |= _optional(figures, "inception_score", lambda: inception_score(found["logits"], splits=1))
    else:
        figures.left_out["inception_score"] = "the extractor gives no class scores"
    return figures


def _of_reference_features(figures: Figures, features: torch.Tensor, extractor: Extractor, statistics: Statistics) -> None:
    if statistics.features is None:
        figures.left_out |= dict.fromkeys(("kid", "precision", "recall"), "the reference holds no features: `dite eval stats --keep-features 5000`")
    else:
        against = statistics.features.double()
        figures.estimates |= _optional(figures, "kid", lambda: kid(features, against))
        try:
            both = precision_recall(features, against)
            figures.estimates |= {"precision": both.precision, "recall": both.recall}
        except UsageError as error:
            figures.left_out |= dict.fromkeys(("precision", "recall"), str(error).splitlines()[0])
    if not extractor.name.startswith("clip"):
        figures.left_out["cmmd"] = "it is of CLIP's embeddings"
    elif statistics.features is None:
        figures.left_out["cmmd"] = figures.left_out["kid"]
    else:
        figures.estimates |= _optional(figures, "cmmd", lambda: cmmd(features, statistics.features))


def _corrected(fid: Estimate, num_features: int) -> Estimate:
    if fid.n < 2 * (num_features + 1):
        why = f"of {num_features} features; FID is no line in 1/N below {2 * (num_features + 1)}, and its interval would hold too seldom"
        raise UsageError(f"{fid.n} samples are too few for a correction {why}")
    return fid.corrected()


def _limit(features: torch.Tensor, reference: Reference, curve: list[tuple[int, float]], force: bool) -> Estimate:
    if force and len(features) < FEWEST:
        raise UsageError(f"{len(features)} samples are too few for an interval around it; the line itself meets {extrapolate(curve):.4g}")
    return estimate_fid_infinity(features, reference, force=force)


def _optional(figures: Figures, name: str, compute: Callable[[], Estimate]) -> dict[str, Estimate]:
    """The estimate, or why there is none. What a run's own numbers make impossible must not lose the others."""
    try:
        return {name: compute()}
    except UsageError as error:
        figures.left_out[name] = str(error).splitlines()[0]
        return {}
