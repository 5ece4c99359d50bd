"""Activations to codes, scale and zero point of each token or each (token, group), after an optional smooth scale and rotation.

The codes are those of `affine.quantize`, bit for bit. A program takes some tokens and one span of columns, twice: for the range, then for the codes
(the second read comes from cache). A span is one group of any size, walked in tiles; or, if groups are short, one tile of several groups.
Shape letters: M tokens, K columns, G groups.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dite_kernels import affine, hadamard
from dite_kernels.quant_tensor import LinearSpec
from dite_kernels.triton_kernels import interpreted
from dite_kernels.triton_kernels.rotation import WIDEST, Transform, tables, tile_width
from dite_kernels.triton_kernels.rounding import scale_and_zero, to_codes, whole, widen

SHORT_TILE = 128  # columns of a tile that holds several groups
MOST_VALUES = 2048  # of a tile, over all its tokens: 16 a thread


@dataclass(frozen=True)
class CodeFormat:
    """How activations are rounded: `affine.quantize`'s arguments. `shifted` gives int8 codes, 128 less, as the integer product wants them."""

    num_bits: int
    group_size: int | None = None
    symmetric: bool = False
    shifted: bool = False

    @classmethod
    def for_product(cls, spec: LinearSpec) -> "CodeFormat":
        """What the integer product of `spec` takes."""
        return cls(spec.activation_bits, spec.activation_group_size, spec.activation_symmetric, shifted=True)


def quantize(x_MK: torch.Tensor, form: CodeFormat, transform: Transform | None = None) -> affine.Quantized:
    """`affine.quantize` of transformed activations: codes [M, K], scale fp32 [M, G], zero_point uint8 [M, G].

    The smooth scale rounds once to x's dtype, the rotation not at all.
    """
    transform = transform or Transform()
    if transform.block and not _rotates_here(x_MK, form.group_size, transform.block):
        x_MK = x_MK if transform.smooth is None else x_MK * transform.smooth.to(x_MK.dtype)
        x_MK, transform = hadamard.rotate(x_MK.float(), transform.block, transform.sign), Transform()
    arguments = (form.num_bits, form.group_size or 0, form.symmetric, transform.multiplier(), transform.block, form.shifted)
    return affine.Quantized(*quantize_activations(x_MK.contiguous(), *arguments))


def _rotates_here(x_MK: torch.Tensor, group_size: int | None, block: int) -> bool:
    """Whether the kernel can rotate: in half precision, where a product with ±1 is exact, and if its tiles and groups share their borders."""
    if block > WIDEST or x_MK.dtype == torch.float32:
        return False
    group, width = affine.group_width(x_MK.shape[1], group_size), tile_width(block)
    return group == x_MK.shape[1] or group % width == 0 or width % group == 0


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
    with torch.cuda.device_of(x):  # Triton launches on the current device
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
            RAGGED=bool(block) and columns % tile != 0,
            # The interpreter's products don't know bf16; elsewhere ±1 costs no precision in any dtype.
            WIDE_PRODUCT=interpreted(),
            TOKENS=tokens,
            TILE=tile,
            num_warps=4,
            enable_fp_fusion=False,
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
    """Columns of a tile without a rotation: the most that pad a group by less than an eighth."""
    if _is_power_of_two(group) and group < SHORT_TILE:
        return SHORT_TILE
    for tile in (1024, 512, 256):
        if -group % tile * 8 < group:
            return tile
    return min(SHORT_TILE, triton.next_power_of_2(group))


def _tokens(rows: int, tile: int, rotates: bool) -> int:
    """Tokens of a program: enough values to hide memory's latency, or the 16 rows of a matrix product."""
    if rotates:
        return 16
    return max(1, min(MOST_VALUES // tile, triton.next_power_of_2(rows), 16))


@triton.jit(do_not_specialize=["M"])
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
    RAGGED: tl.constexpr,
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
    within = tl.arange(0, TILE)
    # The last tile stands apart: it may be rotated by another matrix, and stays in registers for its codes.
    last_columns = first + (TILES - 1) * TILE + within
    matrix, column_scale = None, None
    if matrices_ptr is not None:
        matrix, column_scale = _rotation(matrices_ptr, column_scales_ptr, 0, TILE)
    last_matrix, last_column_scale = matrix, column_scale
    if RAGGED:
        ragged = (first + TILES * TILE > K).to(tl.int32)
        last_matrix, last_column_scale = _rotation(matrices_ptr, column_scales_ptr, ragged, TILE)
    for index in range(TILES - 1):
        columns = first + index * TILE + within
        tile = _read(x_ptr + base, inside, columns, end, multiplier_ptr, matrix, column_scale, WIDE_PRODUCT)
        low, high, has_nan = widen(low, high, has_nan, tl.reshape(tile, [TOKENS, SUBGROUPS, TILE // SUBGROUPS]))
    last_tile = _read(x_ptr + base, inside, last_columns, end, multiplier_ptr, last_matrix, last_column_scale, WIDE_PRODUCT)
    low, high, has_nan = widen(low, high, has_nan, tl.reshape(last_tile, [TOKENS, SUBGROUPS, TILE // SUBGROUPS]))
    scale, zero = scale_and_zero(low, high, has_nan, LEVELS, SYMMETRIC)
    groups = tl.program_id(1) * SUBGROUPS + tl.arange(0, SUBGROUPS)
    place = rows.to(tl.int64)[:, None] * G + groups[None, :]
    tl.store(scale_ptr + place, scale, mask=inside & (groups[None, :] < G))
    tl.store(zero_ptr + place, whole(zero), mask=inside & (groups[None, :] < G))
    _write(codes_ptr + base, inside, last_columns, end, last_tile, scale, zero, LEVELS, SHIFT)
    for index in range(TILES - 1):
        columns = first + index * TILE + within
        tile = _read(x_ptr + base, inside, columns, end, multiplier_ptr, matrix, column_scale, WIDE_PRODUCT)
        _write(codes_ptr + base, inside, columns, end, tile, scale, zero, LEVELS, SHIFT)


@triton.jit
def _rotation(matrices_ptr, column_scales_ptr, index, TILE: tl.constexpr):
    """The matrix of ±1 and 0 of a tile and its columns' scales."""
    within = tl.arange(0, TILE)
    matrix = tl.load(matrices_ptr + index * TILE * TILE + within[:, None] * TILE + within[None, :])
    return matrix, tl.load(column_scales_ptr + index * TILE + within)


@triton.jit
def _read(x_ptrs, inside, columns, end, multiplier_ptr, matrix, column_scale, WIDE_PRODUCT: tl.constexpr):
    """Transformed activations in fp32, 0 outside."""
    x = tl.load(x_ptrs + columns[None, :], mask=inside & (columns[None, :] < end), other=0.0)
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float32)
    if multiplier_ptr is not None:
        by = tl.load(multiplier_ptr + columns, mask=columns < end, other=0.0)
        x = (x * by[None, :]).to(dtype).to(tl.float32)  # rounded as a multiplication by torch in x's dtype would be
    if matrix is not None:
        x = tl.dot(x, matrix.to(tl.float32), input_precision="ieee") if WIDE_PRODUCT else tl.dot(x.to(dtype), matrix)
        x *= column_scale[None, :]
    return x


@triton.jit
def _write(codes_ptrs, inside, columns, end, tile, scale, zero, LEVELS: tl.constexpr, SHIFT: tl.constexpr):
    SUBGROUPS: tl.constexpr = scale.shape[1]
    TOKENS: tl.constexpr = tile.shape[0]
    TILE: tl.constexpr = tile.shape[1]
    grouped = tl.reshape(tile, [TOKENS, SUBGROUPS, TILE // SUBGROUPS])
    codes = to_codes(grouped, scale[:, :, None], zero[:, :, None], LEVELS, SHIFT)
    codes = tl.reshape(codes, [TOKENS, TILE]).to(codes_ptrs.dtype.element_ty)
    tl.store(codes_ptrs + columns[None, :], codes, mask=inside & (columns[None, :] < end))
