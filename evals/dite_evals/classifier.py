"""A small residual classifier for 32×32 images: its features are the yardstick of the CIFAR-10 protocols.

Inception features were made for 299×299 photographs; on 32×32 pictures they mostly measure the resize. This network (0.9 M parameters,
GroupNorm, so that an image's features never depend on its batch) is trained by `recipes/cifar10_dit` on the same data. FIDs computed with
it compare models under this extractor only.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class SmallClassifier(nn.Module):
    """`forward`: uint8 images [B, 3, H, W] → pooled features [B, 192] fp32. `logits`: the same → class scores [B, C]."""

    num_features = 192

    def __init__(self, num_classes: int = 10):
        super().__init__()
        widths = (32, 64, 128, self.num_features)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList(_Stage(narrow, wide) for narrow, wide in pairwise(widths))
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images.to(self.head.weight.dtype) / 127.5 - 1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features of images already scaled to [-1, 1]."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x.mean((2, 3)).float()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)["logits"]

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`features`, and the class scores as `logits`."""
        features = self(images)
        return {"features": features, "logits": self.head(features.to(self.head.weight.dtype))}


class _Stage(nn.Module):
    """Convolve, halve, then one residual pair."""

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.enter = _ConvNorm(narrow, wide)
        self.first = _ConvNorm(wide, wide)
        self.second = _ConvNorm(wide, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(self.enter(x), 2)
        return x + self.second(self.first(x))


class _ConvNorm(nn.Module):
    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.conv = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))
