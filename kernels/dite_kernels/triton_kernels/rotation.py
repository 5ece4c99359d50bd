"""The block Hadamard rotation of `dite_kernels.hadamard` as a matrix product on tiles of W columns, W = max(16, block).

    y = (x · s) H        H = matrix of ±1 and 0, times 1/√b of each column's block

±1 and 0 are exact in every dtype, so that bf16 and fp16 inputs use the fast matrix unit and still give the exact fp32 sum; 1/√b multiplies it in
fp32. (The torch rotation rounds 1/√b and the result to the input's dtype; this one is closer to the definition.) All tiles of a row have the same
matrix, but for the last if the row is ragged. Both lie in one table, so that no kernel works out a block from a column.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from dite_kernels import hadamard

WIDEST = 128
NARROWEST = 16  # the least depth of a product on the matrix unit


@dataclass(frozen=True)
class Transform:
    """What is done to activations [..., K] before they are rounded: x · smooth · sign, then blocks of `block` rotated (0: no rotation)."""

    smooth: torch.Tensor | None = None
    sign: torch.Tensor | None = None
    block: int = 0

    def multiplier(self) -> torch.Tensor | None:
        """smooth · sign, fp32 [K]; exact, since signs are ±1."""
        parts = [part.float() for part in (self.smooth, self.sign) if part is not None]
        return parts[0] * parts[1] if len(parts) == 2 else (parts[0] if parts else None)


def tile_width(block: int) -> int:
    """Columns of a tile that no block straddles."""
    if block > WIDEST or block < 1 or block & (block - 1):
        raise ValueError(f"a rotation in blocks of {block} has no kernel; use a power of two up to {WIDEST}")
    return max(NARROWEST, block)


@lru_cache(maxsize=64)
def tables(columns: int, block: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrices [2, W, W] of ±1 and 0 in `dtype`, fp32 column scales [2, W]): of every full tile, and of the last one of a ragged row."""
    width = tile_width(block)
    with torch.inference_mode(False):
        full, last = _tile(hadamard.blocks(width, block), width), _tile(hadamard.blocks(columns % width, block), width)
        matrices = torch.stack([full, last])
        scales = matrices.abs().sum(1).clamp(min=1).rsqrt().float()
        return matrices.to(device, dtype), scales.to(device)


def _tile(blocks: list[tuple[int, int]], width: int) -> torch.Tensor:
    parts = [hadamard.matrix(size, torch.float64) for size, count in blocks for _ in range(count)]
    signs = torch.block_diag(*parts).sign() if parts else torch.zeros(0, 0, dtype=torch.float64)
    missing = width - signs.shape[1]
    return torch.nn.functional.pad(signs, (0, missing, 0, missing))
