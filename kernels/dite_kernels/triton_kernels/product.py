"""The quantized linear on the integer matrix unit (W4A8, W6A8, W8A8 and narrower activations), groups scaled and summed on the way.

    acc[n, m, g] = Σ_{k in g} w'·x'  −  (x_zero − 128) · Σ (w − w_zero)  −  w_zero' · Σ x'        exact, int32
    y[m, n]      = Σ_g acc · (x_scale[m, g] · w_scale[n, g]) + bias                               fp32, groups in order

x' = x_code − 128 is the only form that activations have in memory. w' = w − w_zero for most weights, then the last term is absent; see `weight`.
What is padded is 0 in w', so that activations past a group's end may be anything.

The product is computed as W · Xᵀ: of its two operands the matrix unit takes the first from registers, which is where 4-bit codes become int8, and the
second from shared memory, where activations arrive by copies that no register sees. Sums are those of `reference.accumulate`; the epilogue
may fuse a multiplication and an addition, and takes a scale per token out of the sum: a few roundings more or less than the reference.
Shape letters: M tokens, N out features, K in features, G groups, P padded columns of a group.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from dite_kernels import affine, reference
from dite_kernels.quant_tensor import LinearSpec
from dite_kernels.triton_kernels import interpreted
from dite_kernels.triton_kernels.weight import TritonWeight

UNROLLED = 2  # steps of a group up to which a group is one iteration, so that loads run ahead across groups
TOKENS_OF_A_SUM = 16
SHARED_BYTES = 96 << 10  # of one program: what the smallest of the newer cards have (8.6, 8.9), and two programs on the larger


@dataclass(frozen=True)
class Launch:
    """A program's tile of out features × tokens, its warps, and how many tiles its loads run ahead."""

    out_features: int
    tokens: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def launch(tokens: int, out_features: int, columns_ahead: int, nibbles: bool, one_group: bool) -> Launch:
    """The launch for a shape; `columns_ahead` are read in one iteration. Chosen by reasoning about registers; it awaits measurement on a card.

    A tile keeps int32 sums and, with several groups, fp32 ones beside them: 32 values of each a thread leave room for everything else.
    """
    if tokens <= 16:
        rows, columns, warps = 64, 16, 4
    elif tokens <= 64 or out_features <= 64:
        rows, columns, warps = 64, 32 if tokens <= 32 else 64, 8
    else:
        rows, columns, warps = 128, 128 if one_group else 64, 8
    bytes_ahead = columns_ahead * (rows // 2 if nibbles else rows) + columns_ahead * columns
    return Launch(rows, columns, warps, max(2, min(4, SHARED_BYTES // bytes_ahead)))


def linear(x: affine.Quantized, weight: TritonWeight, bias: torch.Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> torch.Tensor:
    """y [M, N] in `dtype` from shifted activation codes int8 [M, K] with their scale and zero point [M, 1 or G] (see `CodeFormat.for_product`)."""
    width = affine.group_width(spec.in_features, spec.group_size)
    if width > reference.MAX_GROUP:
        raise ValueError(f"a group of {width} columns can overflow int32; use groups of at most {reference.MAX_GROUP}")
    if x.codes.dtype != torch.int8:
        raise ValueError(f"activation codes are {x.codes.dtype}; the product needs them shifted to torch.int8")
    adjusts = not (spec.activation_symmetric and spec.activation_bits == 8)
    parts = (weight.qdata, weight.scale, weight.sums, weight.zero)
    return integer_linear(*x, *parts, bias, spec.group_size or 0, weight.packs_nibbles, weight.depth, adjusts, dtype)


@torch.library.custom_op("dite_kernels::integer_linear", mutates_args=())
def integer_linear(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    packs_nibbles: bool,
    depth: int,
    adjusts: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The operator behind `linear`; all contiguous. `adjusts`: activation zero points are not all 128."""
    (tokens, columns), (groups, out_features) = x_codes.shape, scale.shape
    y = torch.empty(tokens, out_features, dtype=dtype, device=x_codes.device)
    if not y.numel():
        return y
    group = affine.group_width(columns, group_size or None)
    step = depth * (2 if packs_nibbles else 1)
    padded = qdata.shape[1] * (2 if packs_nibbles else 1) // groups
    # Only int8 codes can still have a zero point to account for; 4-bit ones lose it in registers.
    x_sums = _sum_groups(x_codes, groups, group) if zero is not None and not packs_nibbles else None
    steps = padded // step
    unrolls = steps <= UNROLLED
    chosen = launch(tokens, out_features, step * steps if unrolls else step, packs_nibbles, groups == 1)
    grid = (triton.cdiv(tokens, chosen.tokens) * triton.cdiv(out_features, chosen.out_features),)
    with torch.cuda.device_of(x_codes):  # Triton launches on the current device
        _product[grid](
            x_codes,
            x_scale,
            x_zero,
            x_sums,
            qdata,
            scale,
            sums,
            zero,
            bias,
            y,
            tokens,
            out_features,
            columns,
            group,
            GROUPS=groups,
            STEPS=steps,
            NIBBLES=packs_nibbles,
            PER_GROUP=x_scale.shape[1] > 1,
            ADJUSTS=adjusts,
            MASKS=group % step != 0 or columns % group != 0,
            FAST_BYTES=packs_nibbles and not interpreted(),
            UNROLL=unrolls,
            N_TILE=chosen.out_features,
            M_TILE=chosen.tokens,
            DEPTH=depth,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,  # one instruction an output and group; said here because the default differs between versions
        )
    return y


@integer_linear.register_fake
def _(x_codes, x_scale, x_zero, qdata, scale, sums, zero, bias, group_size, packs_nibbles, depth, adjusts, dtype):
    return x_codes.new_empty((x_codes.shape[0], scale.shape[1]), dtype=dtype)


def _sum_groups(x_codes: torch.Tensor, groups: int, group: int) -> torch.Tensor:
    """int32 [G, M]."""
    tokens, columns = x_codes.shape
    x_sums = torch.empty(groups, tokens, dtype=torch.int32, device=x_codes.device)
    tile = max(16, min(256, triton.next_power_of_2(group)))
    grid = (triton.cdiv(tokens, TOKENS_OF_A_SUM), groups)
    with torch.cuda.device_of(x_codes):  # Triton launches on the current device
        _sums[grid](
            x_codes,
            x_sums,
            tokens,
            columns,
            group,
            TILES=triton.cdiv(group, tile),
            TOKENS=TOKENS_OF_A_SUM,
            TILE=tile,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return x_sums


@triton.jit(do_not_specialize=["M"])
def _sums(x_ptr, sums_ptr, M, K, group, TILES: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * group
    end = tl.minimum(first + group, K)
    found = tl.zeros([TOKENS], tl.int32)
    for index in range(TILES):
        columns = first + index * TILE + tl.arange(0, TILE)
        inside = (rows[:, None] < M) & (columns[None, :] < end)
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=inside, other=0)
        found += tl.sum(x.to(tl.int32), axis=1)
    tl.store(sums_ptr + tl.program_id(1) * M + rows, found, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    x_sums_ptr,
    w_ptr,
    w_scale_ptr,
    w_sums_ptr,
    w_zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    group,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    NIBBLES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ADJUSTS: tl.constexpr,
    MASKS: tl.constexpr,
    FAST_BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
    N_TILE: tl.constexpr,
    M_TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    pid_n, pid_m = _tile_of(tl.program_id(0), tl.cdiv(N, N_TILE), tl.cdiv(M, M_TILE))
    n = pid_n * N_TILE + tl.arange(0, N_TILE)
    m = pid_m * M_TILE + tl.arange(0, M_TILE)
    # Rows past the end are read from the last one: loads without masks can run ahead as bulk copies.
    n_read, m_read = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    within = tl.arange(0, DEPTH)
    bytes_of_a_step: tl.constexpr = DEPTH
    row_bytes: tl.constexpr = GROUPS * STEPS * bytes_of_a_step
    w_ptrs = w_ptr + n_read.to(tl.int64)[:, None] * row_bytes + within[None, :]
    x_ptrs = x_ptr + m_read.to(tl.int64)[None, :] * K + within[:, None]
    columns_of_a_step: tl.constexpr = 2 * DEPTH if NIBBLES else DEPTH
    # What a group needs beside its codes is loaded one group ahead: a program would wait for it longer than its products take.
    w_sums = tl.load(w_sums_ptr + n_read) if ADJUSTS else None
    w_scale = tl.load(w_scale_ptr + n_read)
    total = tl.zeros([N_TILE, M_TILE], tl.float32)
    for g in range(GROUPS):
        ahead = n_read + tl.minimum(g + 1, GROUPS - 1) * N
        scale_ahead = tl.load(w_scale_ptr + ahead)
        zero = tl.load(w_zero_ptr + g * N + n_read) if NIBBLES else None
        sums_ahead = tl.load(w_sums_ptr + ahead) if ADJUSTS else None
        acc = tl.zeros([N_TILE, M_TILE], tl.int32)
        if UNROLL:
            for step in tl.static_range(STEPS):
                k = g * group + step * columns_of_a_step
                end = tl.minimum((g + 1) * group, K) - k
                w_tile = w_ptrs + (g * STEPS + step) * bytes_of_a_step
                acc = _step(acc, x_ptrs + k, w_tile, zero[:, None] if NIBBLES else None, within, end, NIBBLES, MASKS, FAST_BYTES, DEPTH)
        else:
            for step in range(STEPS):
                k = g * group + step * columns_of_a_step
                end = tl.minimum((g + 1) * group, K) - k
                w_tile = w_ptrs + (g * STEPS + step) * bytes_of_a_step
                acc = _step(acc, x_ptrs + k, w_tile, zero[:, None] if NIBBLES else None, within, end, NIBBLES, MASKS, FAST_BYTES, DEPTH)
        x_place = m * (GROUPS if PER_GROUP else 1) + (g if PER_GROUP else 0)
        if ADJUSTS:
            acc -= w_sums[:, None] * (tl.load(x_zero_ptr + x_place, mask=m < M, other=0).to(tl.int32) - 128)[None, :]
        if x_sums_ptr is not None:
            w_zero = tl.load(w_zero_ptr + g * N + n_read).to(tl.int32)
            acc -= w_zero[:, None] * tl.load(x_sums_ptr + g * M + m, mask=m < M, other=0)[None, :]
        by = w_scale.to(tl.float32)[:, None]
        total += acc.to(tl.float32) * (tl.load(x_scale_ptr + x_place, mask=m < M, other=0)[None, :] * by if PER_GROUP else by)
        w_scale = scale_ahead
        if ADJUSTS:
            w_sums = sums_ahead
    if not PER_GROUP:
        total *= tl.load(x_scale_ptr + m, mask=m < M, other=0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n_read).to(tl.float32)[:, None]
    places = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit
def _tile_of(pid, n_tiles, m_tiles):
    """Programs that run together share their operands: they go through blocks of 8 tiles of tokens, out features first."""
    block = 8 * n_tiles
    first = pid // block * 8
    size = tl.minimum(m_tiles - first, 8)
    inside = pid % block
    return inside // size, first + inside % size


@triton.jit
def _step(acc, x_ptrs, w_ptrs, zero, within, end, NIBBLES: tl.constexpr, MASKS: tl.constexpr, FAST_BYTES: tl.constexpr, DEPTH: tl.constexpr):
    """acc plus the product over the DEPTH (2 · DEPTH with nibbles) columns that start at the pointers; `end` columns are left of the group."""
    w = tl.load(w_ptrs)
    x = tl.load(x_ptrs, mask=within[:, None] < end, other=0) if MASKS else tl.load(x_ptrs)
    if NIBBLES:
        x_ptrs += DEPTH
        x_high = tl.load(x_ptrs, mask=within[:, None] + DEPTH < end, other=0) if MASKS else tl.load(x_ptrs)
        low, high = _halves(w, zero, FAST_BYTES)
        acc = tl.dot(low, x, acc, out_dtype=tl.int32)
        acc = tl.dot(high, x_high, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _halves(w, zero, FAST_BYTES: tl.constexpr):
    """int8 w − z of the low and of the high nibbles of `w`."""
    if FAST_BYTES:
        # Four bytes a register. With 128 added no byte borrows from the next, and flipping the top bit takes it away again.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, less;
            sub.u32 less, 0x80808080, $3;
            and.b32 low, $2, 0x0F0F0F0F;
            shr.u32 high, $2, 4;
            and.b32 high, high, 0x0F0F0F0F;
            add.u32 low, low, less;
            add.u32 high, high, less;
            xor.b32 $0, low, 0x80808080;
            xor.b32 $1, high, 0x80808080;
            }""",
            "=r,=r,r,r",
            [w, tl.broadcast_to(zero, w.shape)],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (w & 15).to(tl.int8) - zero.to(tl.int8)
        high = (w >> 4).to(tl.int8) - zero.to(tl.int8)
    return low, high
