"""Block Hadamard rotation along the last dimension: spreads outliers over a block, so that a block's range shrinks.

    y = (x · s) H        s ∈ {±1}^K, H block-diagonal, orthogonal and symmetric

H's blocks are Sylvester matrices scaled by 1/√b. Any K works: blocks of `block` as long as they fit, then ever smaller powers of two (1152 = 9 · 128,
100 = 64 + 32 + 4). y H · s gives x back, and x Wᵀ = rotate(x) rotate(W)ᵀ.
"""

import hashlib
from functools import lru_cache

import torch


def blocks(columns: int, block: int) -> list[tuple[int, int]]:
    """(width, how many) of the blocks in order.

    >>> blocks(1152, 128), blocks(100, 64)
    ([(128, 9)], [(64, 1), (32, 1), (4, 1)])
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"a block of {block} is no power of two")
    found = []
    while columns:
        if columns >= block:
            found.append((block, columns // block))
            columns %= block
        block //= 2
    return found


def matrix(width: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthogonal symmetric Sylvester matrix [width, width]."""
    return _on(width, dtype, torch.device(device))


def signs(columns: int, seed: int) -> torch.Tensor:
    """±1 fp32 [columns], the same on every machine and version: bits of SHAKE-256 of the seed."""
    bits = torch.frombuffer(bytearray(hashlib.shake_256(f"dite signs {seed}".encode()).digest(-(-columns // 8))), dtype=torch.uint8)
    bits = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return 1.0 - 2.0 * bits.flatten()[:columns].float()


def rotate(x: torch.Tensor, block: int, sign: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] rotated, in its own dtype; `sign` [K] flips columns beforehand."""
    x = x if sign is None else x * sign.to(x.device, x.dtype)
    parts, start = [], 0
    for width, count in blocks(x.shape[-1], block):
        part = x[..., start : start + width * count]
        start += width * count
        parts.append(part if width == 1 else (part.unflatten(-1, (count, width)) @ matrix(width, x.dtype, x.device)).flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@lru_cache(maxsize=64)
def _on(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return _matrix(width).to(device, dtype)


@lru_cache(maxsize=16)
def _matrix(width: int) -> torch.Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # cached for everyone, whatever mode the first caller is in
        rows = torch.ones(1, 1, dtype=torch.float64)
        while len(rows) < width:
            rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
        return rows / width**0.5
