"""Inception score: how sure a classifier is of each image, and how many classes it sees (Salimans et al. 2016, arXiv 1606.03498).

    IS = exp( mean_n KL( p(c|n) ‖ p(c) ) ) = exp( Σ_c mean_n p log p − Σ_c m log m ),   m = mean_n p;   between 1 and C

The customary number is the mean over splits: 10 of them (torchmetrics), or as many as hold 5,000 samples (ADM). It grows with the size of a split,
so say it. There is no reference: a model that repeats one good image of each class has the best score. N samples, C classes.
"""

from __future__ import annotations

import torch

from dite.errors import UsageError
from dite_evals.features import Features, as_features, group_slices
from dite_evals.intervals import FEWEST, LEVEL, Estimate, jackknife

SPLITS = 10


def inception_score(logits: Features, splits: int = SPLITS, seed: int | None = None, level: float = LEVEL) -> Estimate:
    """Mean inception score over `splits` contiguous parts of logits [N, C], with an interval; N at least 2 in each part and 4 in all.

    With `seed` the samples are shuffled first, as torchmetrics does; shuffle samples that are sorted by class, whose parts would each see a few
    classes only. The interval is Student's over the splits; for one split a jackknife over groups of samples. It is about other samples of the
    same model in splits of this size.
    """
    x = as_features(logits, "logits", at_least=FEWEST)
    if splits < 1 or len(x) < 2 * splits:
        raise UsageError(
            f"{len(x)} samples can't be cut into {splits} splits", f"a split has at least 2 samples: {2 * splits} are needed", "use fewer splits"
        )
    if seed is not None:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)]
    bounds = (1.0, float(x.shape[1]))
    if splits > 1:
        scores = [_score(*_sums(part)) for part in x.tensor_split(splits)]
        total = sum(scores)
        return jackknife(total / splits, [(total - score) / (splits - 1) for score in scores], len(x), level, bounds)
    parts = [_sums(x[group]) for group in group_slices(len(x))]
    certain, classes, count = (sum(column[1:], column[0]) for column in zip(*parts, strict=True))
    without = [_score(certain - part[0], classes - part[1], count - part[2]) for part in parts]
    return jackknife(_score(certain, classes, count), without, len(x), level, bounds)


def _sums(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Σ p log p, Σ_n p [C], and n."""
    logs = logits.log_softmax(1)
    shares = logs.exp()
    return (shares * logs).sum(), shares.sum(0), len(logits)


def _score(certain: torch.Tensor, classes: torch.Tensor, n: int) -> float:
    mean = (classes / n).clamp(min=0)
    return (certain / n - torch.xlogy(mean, mean).sum()).exp().item()
