"""Resizing for extractors: the filter alone can move an FID by more than two good models differ (Parmar et al. 2022, arXiv 2104.11222).

    clean     Pillow's bicubic, widened when it shrinks so that nothing is skipped; in floats, neither rounded nor clipped. clean-fid's.
    legacy    TensorFlow 1's bilinear: output pixel i reads input position i · in / out and its right neighbour, however much it shrinks,
              and the corners are not aligned. The first FID's, and that of ADM's evaluator.
    none      images must already have the extractor's size.

Both are computed here and not by the libraries, so that they are the same on every device and need no TensorFlow; tests compare the first
with Pillow itself. B images, H × W pixels, S the new size.
"""

from __future__ import annotations

from typing import Literal

import torch

Resize = Literal["clean", "legacy", "none"]
RESIZES: tuple[Resize, ...] = ("clean", "legacy", "none")
CUBIC_A = -0.5
CUBIC_SUPPORT = 2.0


def resize(images: torch.Tensor, size: int, how: Resize) -> torch.Tensor:
    """uint8 [B, 3, H, W] → fp32 [B, 3, S, S], still in 0..255 (clean overshoots a little).

    >>> resize(torch.tensor([[[[0, 100]]]], dtype=torch.uint8), 4, "legacy")[0, 0, 0].tolist()
    [0.0, 50.0, 100.0, 100.0]
    """
    if how == "none":
        assert images.shape[-2:] == (size, size), "the extractor refuses other sizes before it comes to this"
        return images.float()
    return (clean if how == "clean" else legacy)(images, size)


def clean(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic in fp64, rounded to fp32 after each of the two passes as in Pillow: the same bits where both take rows first, else within an ulp."""
    x = images.double()
    height, width = images.shape[-2:]
    if width != size:
        x = (x @ bicubic_weights(width, size).to(x.device).T).float().double()
    if height != size:
        x = bicubic_weights(height, size).to(x.device) @ x
    return x.float()


def bicubic_weights(old: int, new: int) -> torch.Tensor:
    """fp64 [new, old]: row i weighs the old pixels for the new pixel i.

    Its centre lies at (i + ½) · old / new; the kernel (Keys 1981, a = −½) is stretched by old / new when that is above 1; rows sum to 1.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(old, dtype=torch.float64)[None]
    first = (centre - CUBIC_SUPPORT * stretch + 0.5).trunc().clamp(min=0)
    end = (centre + CUBIC_SUPPORT * stretch + 0.5).trunc().clamp(max=old)
    weights = torch.where((pixel >= first) & (pixel < end), _cubic((pixel - centre + 0.5) * (1.0 / stretch)), 0.0)
    return weights / weights.sum(1, keepdim=True)


def legacy(images: torch.Tensor, size: int) -> torch.Tensor:
    """TF1's `ResizeBilinear(align_corners=False, half_pixel_centers=False)`: fp32 throughout, positions included, columns before rows."""
    x = images.float()
    left, right, across = _neighbours(images.shape[-1], size, images.device)
    above, below, down = _neighbours(images.shape[-2], size, images.device)
    top, bottom = x[:, :, above], x[:, :, below]
    top = top[..., left] + (top[..., right] - top[..., left]) * across
    bottom = bottom[..., left] + (bottom[..., right] - bottom[..., left]) * across
    return top + (bottom - top) * down[:, None]


def _neighbours(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each new pixel the old ones before and after its position, and how far it lies between them."""
    position = torch.arange(new, dtype=torch.float32) * (torch.tensor(float(old)) / torch.tensor(float(new)))
    before = position.floor().long()
    after = (before + 1).clamp(max=old - 1)
    return before.to(device), after.to(device), (position - before).to(device)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC_A
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
