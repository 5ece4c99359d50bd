"""Codes ↔ bytes. Row-major and the same on every machine; kernels repack at load.

    8 bits   [N, K]             a byte a code
    6 bits   [N, 3·ceil(K/4)]   4 codes in 3 bytes, little-endian, code 0 in the low bits
    4 bits   [N, ceil(K/2)]     low nibble = even column

Rows are padded with code 0, which `unpack` drops.
"""

import torch
import torch.nn.functional as F


def packed_columns(columns: int, num_bits: int) -> int:
    """Bytes a row of `columns` codes takes.

    >>> [packed_columns(5, bits) for bits in (4, 6, 8)]
    [3, 6, 5]
    """
    return {8: columns, 6: 3 * -(-columns // 4), 4: -(-columns // 2)}[num_bits]


def pack(codes_NK: torch.Tensor, num_bits: int) -> torch.Tensor:
    """uint8 codes [N, K], each below 2^num_bits, to uint8 [N, packed_columns]."""
    if num_bits == 8:
        return codes_NK.contiguous()
    if num_bits == 4:
        pairs = _padded(codes_NK, 2)
        return pairs[..., 0] | (pairs[..., 1] << 4)
    a, b, c, d = _padded(codes_NK, 4).unbind(-1)
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], -1).flatten(1)


def unpack(packed: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [N, packed_columns] to codes [N, columns]."""
    if num_bits == 8:
        return packed
    if num_bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]
    a, b, c = packed.unflatten(1, (-1, 3)).unbind(-1)
    codes = [a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2]
    return torch.stack(codes, -1).flatten(1)[:, :columns]


def has_padding_set(packed: torch.Tensor, num_bits: int, columns: int) -> bool:
    """Whether anything but 0 lies behind the last of `columns` codes in a row: nothing that `pack` made has that.

    >>> has_padding_set(torch.tensor([[0x21, 0x03]], dtype=torch.uint8), 4, 3), has_padding_set(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, 3)
    (False, True)
    """
    per_byte_group = {8: 1, 6: 4, 4: 2}[num_bits]
    if columns % per_byte_group == 0 or not packed.numel():
        return False
    last = packed[:, -(3 if num_bits == 6 else 1) :]
    return bool(unpack(last, num_bits, per_byte_group)[:, columns % per_byte_group :].any())


def _padded(codes_NK: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(codes_NK, (0, -codes_NK.shape[1] % multiple)).unflatten(1, (-1, multiple))
