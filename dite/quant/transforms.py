"""What is done to a weight before it is rounded, besides rotation: a smooth scale, and a low-rank part. Both leave the layer's function as it is.

    y = (x · m) (W / m)ᵀ                 smooth: m [K] moves range between activations and weights (SmoothQuant, arXiv 2211.10438)
    W = U D + (W − U D)                  low rank: U [N, r], D [r, K] stay in floats and take what is hard to round (SVDQuant, arXiv 2411.05007)

Shapes: N out features, K in features, r rank.
"""

import torch

from dite.quant.gptq import roots

SMALLEST, LARGEST = 2.0**-14, 2.0**15  # normal numbers of fp16


def smooth_scale(peaks: torch.Tensor, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """The multiplier m fp32 [K] of a layer's inputs: 1 / (peaks^strength / max|W|^(1 − strength)), with geometric mean 1.

    `peaks` [K] are the largest magnitudes of each input channel. Channels that are always zero, on either side, count as tiny. The numbers are such
    that bf16, fp16 and fp32 all hold them exactly.
    """
    inputs, weights = _positive(peaks.float()), _positive(weight.detach().float().abs().amax(0))
    scale = inputs.pow(strength) / weights.pow(1 - strength)
    return representable((scale.log().mean() - scale.log()).exp())


def representable(multiplier: torch.Tensor) -> torch.Tensor:
    """The nearest positive numbers that bf16 and fp16 both hold, in fp32."""
    return multiplier.float().clamp(SMALLEST, LARGEST).bfloat16().float()


def low_rank(weight: torch.Tensor, moments: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [r, K], up [N, r]), the best approximation of `weight` [N, K] of that rank for inputs with second moments `moments` [K, K].

    Without moments (or with NaN in them), all input directions count alike. A rank above the weight's own leaves the rest zero.
    """
    wide = weight.double()
    root = None if moments is None else next(roots(moments), None)
    u, s, v = torch.linalg.svd(wide if root is None else wide @ root, full_matrices=False)
    rank_here = min(rank, len(s))
    up, down = u[:, :rank_here] * s[:rank_here].sqrt(), s[:rank_here, None].sqrt() * v[:rank_here]
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    missing = rank - rank_here
    return torch.nn.functional.pad(down, (0, 0, 0, missing)).float(), torch.nn.functional.pad(up, (0, missing)).float()


def _positive(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(min=max(1e-5 * float(values.max()), torch.finfo(torch.float32).tiny))
