"""Activations to codes, scale and zero point of each token or each (token, group), after an optional smooth scale and rotation.

The codes are those of `affine.quantize`, bit for bit. A program takes some tokens and one span of columns, twice: for the range, then for the codes (the
second read comes from cache). A span is one group of any size, walked in tiles; or, if groups are short, one tile of several groups.
Shape letters: M tokens, K columns, G groups.
"""

import torch
import triton
import triton.language as tl

from dite_kernels import affine, hadamard
from dite_kernels.triton_kernels.rotation import Transform, tables, tile_width
from dite_kernels.triton_kernels.rounding import scale_and_zero, to_codes, whole, widen

SHORT_TILE = 128  # columns of a tile that holds several groups
PLAIN_TILE = 1024  # columns; a thread's share is then 8 to 32 values
MOST_VALUES = 8192  # of a tile, over all its tokens


def quantize(
    x_MK: torch.Tensor, num_bits: int, group_size: int | None, symmetric: bool, transform: Transform | None = None, shifted: bool = False
) -> affine.Quantized:
    """`affine.quantize` of transformed activations: codes [M, K], scale fp32 [M, G], zero_point uint8 [M, G].

    `shifted` gives int8 codes, 128 less, as the integer product wants them. The smooth scale rounds once to x's dtype, the rotation not at all.
    """
    transform = transform or Transform()
    if transform.block and not _fits(affine.group_width(x_MK.shape[1], group_size), x_MK.shape[1], tile_width(transform.block)):
        x_MK = x_MK if transform.smooth is None else x_MK * transform.smooth.to(x_MK.dtype)
        x_MK, transform = hadamard.rotate(x_MK.float(), transform.block, transform.sign), Transform()
    arguments = (num_bits, group_size or 0, symmetric, transform.multiplier(), transform.block, shifted)
    return affine.Quantized(*quantize_activations(x_MK.contiguous(), *arguments))


def _fits(group: int, columns: int, width: int) -> bool:
    """Whether tiles of the rotation and groups share their borders."""
    return group == columns or group % width == 0 or width % group == 0


@torch.library.custom_op("dite_kernels::quantize_activations", mutates_args=())
def quantize_activations(
    x: torch.Tensor, num_bits: int, group_size: int, symmetric: bool, multiplier: torch.Tensor | None, block: int, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator behind `quantize`: x [M, K] contiguous; group_size 0 means whole rows, block 0 no rotation."""
    rows, columns = x.shape
    codes, scale, zero = like_quantized(x, group_size, shifted)
    if not codes.numel():
        return codes, scale, zero
    group = affine.group_width(columns, group_size or None)
    tile = tile_width(block) if block else _plain_tile(group)
    subgroups = tile // group if _is_power_of_two(group) and group < tile else 1
    tokens = _tokens(rows, tile, bool(block))
    matrices, column_scales = tables(columns, block, x.dtype, x.device) if block else (None, None)
    spans = triton.cdiv(columns, tile) if subgroups > 1 else scale.shape[1]
    _quantize[(triton.cdiv(rows, tokens), spans)](
        x,
        codes,
        scale,
        zero,
        multiplier,
        matrices,
        column_scales,
        rows,
        columns,
        group,
        scale.shape[1],
        LEVELS=2**num_bits - 1,
        SYMMETRIC=symmetric,
        SHIFT=128 if shifted else 0,
        SUBGROUPS=subgroups,
        # Known at compile time: there are few shapes in a model, and Triton's interpreter can't loop to a number that numpy holds.
        TILES=1 if subgroups > 1 else triton.cdiv(group, tile),
        # The interpreter's products don't know bf16; elsewhere ±1 costs no precision in any dtype.
        WIDE_PRODUCT=x.device.type == "cpu",
        TOKENS=tokens,
        TILE=tile,
        num_warps=8 if tokens * tile >= 4096 else 4,
    )
    return codes, scale, zero


@quantize_activations.register_fake
def _(x, num_bits, group_size, symmetric, multiplier, block, shifted):
    return like_quantized(x, group_size, shifted)


def like_quantized(x: torch.Tensor, group_size: int, shifted: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the codes, scale and zero point of `x` [M, K]."""
    groups = affine.group_count(x.shape[1], group_size or None)
    codes = torch.empty(x.shape, dtype=torch.int8 if shifted else torch.uint8, device=x.device)
    scale = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
    return codes, scale, torch.empty(x.shape[0], groups, dtype=torch.uint8, device=x.device)


def _is_power_of_two(number: int) -> bool:
    return not number & (number - 1)


def _plain_tile(group: int) -> int:
    if _is_power_of_two(group) and group < SHORT_TILE:
        return SHORT_TILE
    return min(PLAIN_TILE, triton.next_power_of_2(group))


def _tokens(rows: int, tile: int, rotates: bool) -> int:
    """Tokens of a program: enough values to hide memory's latency, no more than there are, at least the 16 rows of a matrix product."""
    most = min(MOST_VALUES // tile, triton.next_power_of_2(rows), 32 if rotates else 16)
    return max(most, 16 if rotates else 1)


@triton.jit
def _quantize(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    multiplier_ptr,
    matrices_ptr,
    column_scales_ptr,
    M,
    K,
    group,
    G,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SHIFT: tl.constexpr,
    SUBGROUPS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE_PRODUCT: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * (TILE if SUBGROUPS > 1 else group)
    end = tl.minimum(first + (TILE if SUBGROUPS > 1 else group), K)
    inside = rows[:, None] < M
    base = rows.to(tl.int64)[:, None] * K
    low = tl.zeros([TOKENS, SUBGROUPS], tl.float32)
    high = tl.zeros([TOKENS, SUBGROUPS], tl.float32)
    has_nan = tl.zeros([TOKENS, SUBGROUPS], tl.int32)
    columns = first + tl.arange(0, TILE)
    tile = _read(x_ptr + base, inside, columns, end, K, multiplier_ptr, matrices_ptr, column_scales_ptr, WIDE_PRODUCT, TILE)
    low, high, has_nan = widen(low, high, has_nan, tl.reshape(tile, [TOKENS, SUBGROUPS, TILE // SUBGROUPS]))
    if TILES > 1:
        for index in range(1, TILES):
            columns = first + index * TILE + tl.arange(0, TILE)
            tile = _read(x_ptr + base, inside, columns, end, K, multiplier_ptr, matrices_ptr, column_scales_ptr, WIDE_PRODUCT, TILE)
            low, high, has_nan = widen(low, high, has_nan, tl.reshape(tile, [TOKENS, SUBGROUPS, TILE // SUBGROUPS]))
    scale, zero = scale_and_zero(low, high, has_nan, LEVELS, SYMMETRIC)
    groups = tl.program_id(1) * SUBGROUPS + tl.arange(0, SUBGROUPS)
    place = rows.to(tl.int64)[:, None] * G + groups[None, :]
    tl.store(scale_ptr + place, scale, mask=inside & (groups[None, :] < G))
    tl.store(zero_ptr + place, whole(zero), mask=inside & (groups[None, :] < G))
    if TILES == 1:
        _write(codes_ptr + base, inside, columns, end, tile, scale, zero, LEVELS, SHIFT, SUBGROUPS)
    else:
        for index in range(TILES):
            columns = first + index * TILE + tl.arange(0, TILE)
            tile = _read(x_ptr + base, inside, columns, end, K, multiplier_ptr, matrices_ptr, column_scales_ptr, WIDE_PRODUCT, TILE)
            _write(codes_ptr + base, inside, columns, end, tile, scale, zero, LEVELS, SHIFT, SUBGROUPS)


@triton.jit
def _read(x_ptrs, inside, columns, end, K, multiplier_ptr, matrices_ptr, column_scales_ptr, WIDE_PRODUCT: tl.constexpr, TILE: tl.constexpr):
    """Transformed activations in fp32, 0 outside."""
    x = tl.load(x_ptrs + columns[None, :], mask=inside & (columns[None, :] < end), other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if multiplier_ptr is not None:
        by = tl.load(multiplier_ptr + columns, mask=columns < end, other=0.0)
        x = (x * by[None, :]).to(dtype).to(tl.float32)  # rounded as a multiplication by torch in x's dtype would be
    if matrices_ptr is not None:
        within = tl.arange(0, TILE)
        ragged = (tl.max(columns, axis=0) >= K).to(tl.int32)
        matrix = tl.load(matrices_ptr + ragged * TILE * TILE + within[:, None] * TILE + within[None, :])
        if WIDE_PRODUCT:
            x = tl.dot(x, matrix.to(tl.float32), input_precision="ieee")
        else:
            x = tl.dot(x.to(dtype), matrix, input_precision="ieee")
        x *= tl.load(column_scales_ptr + ragged * TILE + within)[None, :]
    return x


@triton.jit
def _write(codes_ptrs, inside, columns, end, tile, scale, zero, LEVELS: tl.constexpr, SHIFT: tl.constexpr, SUBGROUPS: tl.constexpr):
    TOKENS: tl.constexpr = tile.shape[0]
    TILE: tl.constexpr = tile.shape[1]
    grouped = tl.reshape(tile, [TOKENS, SUBGROUPS, TILE // SUBGROUPS])
    codes = to_codes(grouped, scale[:, :, None], zero[:, :, None], LEVELS, SHIFT)
    codes = tl.reshape(codes, [TOKENS, TILE]).to(codes_ptrs.dtype.element_ty)
    tl.store(codes_ptrs + columns[None, :], codes, mask=inside & (columns[None, :] < end))
