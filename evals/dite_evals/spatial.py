"""Spatial features, for sFID: a Fréchet distance that sees where things are in an image (Nash et al. 2021, arXiv 2103.03841).

FID's features are pooled over the image; sFID takes the first 7 channels of an inner layer (`mixed_6/conv`, 17 × 17: 2,023 features) as they lie.
`estimate_fid` of these features against reference moments of the same kind is sFID.
"""

from __future__ import annotations

import torch

from dite.errors import UsageError

CHANNELS = 7


def spatial_features(maps: torch.Tensor, channels: int = CHANNELS) -> torch.Tensor:
    """The first `channels` of feature maps [N, C, H, W] as features [N, H · W · channels].

    In ADM's order (channels last), so that its `mu_s` and `sigma_s` fit. Raises UsageError for another shape, or fewer channels.

    >>> spatial_features(torch.zeros(2, 768, 17, 17)).shape
    torch.Size([2, 2023])
    """
    if maps.dim() != 4 or not 1 <= channels <= maps.shape[1] or maps[:1].numel() == 0:
        raise UsageError(
            "these are no feature maps",
            f"their shape is {list(maps.shape)}, expected [N, C, H, W] with at least {channels} channels",
            "take another layer",
        )
    return maps[:, :channels].permute(0, 2, 3, 1).flatten(1)
