"""Inception-v3 as the FID knows it: the network of the first FID (Heusel et al. 2017, arXiv 1706.08500), in PyTorch.

It is TensorFlow's `inception-2015-12-05` graph, and not torchvision's `inception_v3`, from which it differs in more than the weights:

    input                   (x − 128) / 128 of the 299×299 image; resized by TF1's bilinear rule (`legacy`), or beforehand (`clean`)
    average pools           of the 35×35, the 17×17 and the first 8×8 blocks leave the padding out of the average
    last block              pools by maximum
    classes                 1008, of which 1000 mean something; no auxiliary head

Weights come from a safetensors file with the usual names of the PyTorch conversion (`Conv2d_1a_3x3.conv.weight`, `Mixed_5b.branch1x1.bn.bias`,
…, `fc.weight`), which the user provides. Each block is a table here: chains of convolutions side by side, and a pool.

    features [B, 2048]      `pool_3`: the mean over the last 8×8
    spatial  [B, 2023]      for sFID (Nash et al. 2021, arXiv 2103.03841; as ADM's evaluator): `mixed_6/conv`, which is `Mixed_6d.branch1x1`
                            after its ReLU, the first 7 channels of 17×17, flattened as TensorFlow does: row, column, channel
    logits   [B, 1008]      for the inception score: without the bias, as all TensorFlow code computes it
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dite.errors import CheckpointError, UsageError
from dite_evals.extractors import Extractor
from dite_evals.resize import Resize, resize
from dite_evals.spatial import CHANNELS, spatial_features
from dite_evals.weights import fit_, read_weights, weights_sha256

NAME = "inception-v3-tf"
SIZE = 299
CLASSES = 1008
SPATIAL_BLOCK = "Mixed_6d"
GOLDEN = ".golden.safetensors"
GOLDEN_TOLERANCE = 1e-3
HINT = (
    "the weights are pytorch-fid's pt_inception-2015-12-05-6726825d.pth (its SHA-256 begins with 6726825d), converted once: "
    "dite convert pt_inception-2015-12-05-6726825d.pth -o inception.safetensors"
)

Step = tuple[str, int, tuple[int, int]]  # name, channels, kernel (rows, columns)
Chain = tuple[Step | tuple[Step, ...], ...]  # one after the other; a tuple of steps forks, and its ends are joined


@dataclass(frozen=True)
class Block:
    """Chains side by side, then the pool: `average` or `max` with `pool_channels` behind it, or at stride 2 a bare maximum."""

    chains: tuple[Chain, ...]
    pool: str = "max"
    pool_channels: int = 0
    stride: int = 1


ONE, THREE, FIVE, ROW, COLUMN, ROW3, COLUMN3 = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)


def _block_35(pool_channels: int) -> Block:
    double = (("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE))
    chains = ((("branch1x1", 64, ONE),), (("branch5x5_1", 48, ONE), ("branch5x5_2", 64, FIVE)), double)
    return Block(chains, "average", pool_channels)


def _block_17(width: int) -> Block:
    single = (("branch7x7_1", width, ONE), ("branch7x7_2", width, ROW), ("branch7x7_3", 192, COLUMN))
    double = tuple(
        (f"branch7x7dbl_{number}", channels, kernel)
        for number, channels, kernel in ((1, width, ONE), (2, width, COLUMN), (3, width, ROW), (4, width, COLUMN), (5, 192, ROW))
    )
    return Block(((("branch1x1", 192, ONE),), single, double), "average", 192)


def _block_8(pool: str) -> Block:
    single = (("branch3x3_1", 384, ONE), (("branch3x3_2a", 384, ROW3), ("branch3x3_2b", 384, COLUMN3)))
    fork = (("branch3x3dbl_3a", 384, ROW3), ("branch3x3dbl_3b", 384, COLUMN3))
    double = (("branch3x3dbl_1", 448, ONE), ("branch3x3dbl_2", 384, THREE), fork)
    return Block(((("branch1x1", 320, ONE),), single, double), pool, 192)


BLOCKS = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": Block(
        ((("branch3x3", 384, THREE),), (("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE))), stride=2
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": Block(
        (
            (("branch3x3_1", 192, ONE), ("branch3x3_2", 320, THREE)),
            (("branch7x7x3_1", 192, ONE), ("branch7x7x3_2", 192, ROW), ("branch7x7x3_3", 192, COLUMN), ("branch7x7x3_4", 192, THREE)),
        ),
        stride=2,
    ),
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),
}


class InceptionV3(nn.Module):
    """`forward`: uint8 images [B, 3, H, W] → features [B, 2048]. `outputs`: those, and what sFID and the inception score need."""

    num_features = 2048
    num_spatial = 17 * 17 * CHANNELS
    batch_size = 50

    def __init__(self, how: Resize = "legacy"):
        super().__init__()
        self.how = how
        self.Conv2d_1a_3x3 = _Conv(3, 32, THREE, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, THREE, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, THREE)
        self.Conv2d_3b_1x1 = _Conv(64, 80, ONE)
        self.Conv2d_4a_3x3 = _Conv(80, 192, THREE, padded=False)
        channels = 192
        for name, block in BLOCKS.items():
            mixed = _Mixed(channels, block)
            channels = mixed.channels
            self.add_module(name, mixed)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)["features"]

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`features`, `spatial` and `logits` as the module says."""
        return self.measure(resize(images, SIZE, self.how))

    def measure(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same of images that are resized already: fp32 [B, 3, 299, 299] in 0..255."""
        x = (pixels - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        found = {}
        for name in BLOCKS:
            x = getattr(self, name)(x)
            if name == SPATIAL_BLOCK:  # branch1x1 comes first in the block, so its first channels are the block's
                found["spatial"] = spatial_features(x)
        features = x.mean((2, 3))
        return {"features": features, **found, "logits": features @ self.fc.weight.T}


class _Conv(nn.Module):
    """Convolution, BatchNorm with TensorFlow's epsilon, ReLU. Padded to keep the size, unless it halves it or is told not to."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """One `Block`. At stride 2 the last convolution of each chain halves."""

    def __init__(self, inputs: int, block: Block):
        super().__init__()
        self.block = block
        self.channels = block.pool_channels or inputs
        for chain in block.chains:
            width = inputs
            for step in chain:
                ends = step if isinstance(step[0], tuple) else (step,)
                for name, channels, kernel in ends:
                    self.add_module(name, _Conv(width, channels, kernel, block.stride if step is chain[-1] else 1))
                width = sum(channels for _, channels, _ in ends)
            self.channels += width
        if block.pool_channels:
            self.branch_pool = _Conv(inputs, block.pool_channels, ONE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([*(self._chain(chain, x) for chain in self.block.chains), self._pool(x)], 1)

    def _chain(self, chain: Chain, x: torch.Tensor) -> torch.Tensor:
        for step in chain:
            ends = step if isinstance(step[0], tuple) else (step,)
            x = torch.cat([getattr(self, name)(x) for name, _, _ in ends], 1)
        return x

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.block.stride == 2:
            return F.max_pool2d(x, 3, 2)
        if self.block.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def load_inception(weights: str | os.PathLike[str] | None, how: Resize = "legacy") -> Extractor:
    """The extractor with the weights of a safetensors file. Beside `NAME.safetensors` a `NAME.golden.safetensors` (`images` uint8
    [B, 3, H, W], `features` [B, 2048] of another implementation, resized by `legacy`) is checked if it is there.

    Raises UsageError without weights or for a pickle, CheckpointError for weights that don't fit, or that give other features.
    """
    if weights is None:
        raise UsageError(
            "extractor inception needs its weights",
            "none were given, and dite downloads nothing by itself",
            f"--weights FILE, or --set weights=FILE of a protocol; {HINT}",
        )
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"no weights at {path}", "the file does not exist", f"check the path; {HINT}")
    state = read_weights(path, HINT)
    with torch.device("meta"):
        network = InceptionV3(how)
    fit_(network, state, path, _hint(state))
    for counter in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        counter.num_batches_tracked = None
    extractor = Extractor(network, NAME, weights_sha256(network.state_dict()), f"{how}{SIZE}:(x-128):128", SIZE if how == "none" else None)
    golden = path.with_name(path.stem + GOLDEN)
    if golden.is_file():
        check_golden(network, golden)
    return extractor


def check_golden(network: InceptionV3, path: Path) -> None:
    """Raise CheckpointError unless the network gives the features in `path`, within 0.1% of their largest."""
    hint = f"the weights or {path.name} belong to another network; delete it to go without this check"
    golden = read_weights(path, hint)
    if golden.keys() != {"images", "features"} or golden["images"].dtype != torch.uint8 or golden["images"].dim() != 4:
        raise CheckpointError(f"{path} is no golden vector", f"it holds {sorted(golden)}, expected uint8 images and their features", hint)
    with torch.no_grad():
        found = network.measure(resize(golden["images"], SIZE, "legacy"))["features"]
    expected = golden["features"].float()
    if expected.shape != found.shape:
        raise CheckpointError(f"{path} is no golden vector", f"its features are {list(expected.shape)}, expected {list(found.shape)}", hint)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= GOLDEN_TOLERANCE:
        raise CheckpointError("this Inception gives other features than it should", f"off by {error:.2g}, allowed {GOLDEN_TOLERANCE:g}", hint)


def _hint(state: dict[str, torch.Tensor]) -> str:
    theirs = any(key.startswith("AuxLogits") for key in state) or ("fc.weight" in state and len(state["fc.weight"]) == 1000)
    return f"these look like torchvision's weights, with which no FID is comparable; {HINT}" if theirs else HINT
