"""Trains `dite_evals.classifier.SmallClassifier`: cross-entropy with label smoothing, random flips and shifts of up to 4 pixels."""

import torch
import torch.nn.functional as F
from data import to_signed

from dite_evals.classifier import SmallClassifier


def make_loss(model: SmallClassifier, images: torch.Tensor, labels: torch.Tensor, device: torch.device, compiled: bool):
    """Loss over `images` uint8 [N, 3, 32, 32] and `labels` int64 [N]."""
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)

    def scores(x: torch.Tensor) -> torch.Tensor:
        return model.head(model.features(x))

    forward = torch.compile(scores, dynamic=False) if compiled else scores

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x = _shift(padded[indices], torch.randint(9, (2,), generator=generator).tolist())
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return F.cross_entropy(forward(to_signed(x).to(device)).float(), labels[indices].to(device), label_smoothing=0.1)

    return loss


@torch.no_grad()
def accuracy(model: SmallClassifier, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    """Share of `images` whose largest score is their label."""
    predicted = torch.cat([model.logits(batch.to(device)).argmax(1).cpu() for batch in images.split(500)])
    return (predicted == labels).float().mean().item()


def _shift(padded: torch.Tensor, offset: list[int]) -> torch.Tensor:
    top, left = offset
    return padded[..., top : top + 32, left : left + 32]
