"""What stands before most linears of a DiT, fused with the quantizer: one read of the activations, one write of a byte a value.

    y = LayerNorm(x) · (1 + scale) + shift      no affine part; scale and shift of each sample, from the timestep (adaLN, arXiv 2212.09748)
    codes, scale, zero point of y               as affine.quantize gives them

A program holds one token in registers, as a tile [groups, columns of a group], all in fp32. The reference is `modulate_reference`; mean and variance
are summed in another order than torch's, so that a value near a rounding border may get the neighbouring code.
Shape letters: B samples, L tokens of a sample, C columns, G groups.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dite_kernels import affine
from dite_kernels.triton_kernels.quantize import CodeFormat, like_quantized
from dite_kernels.triton_kernels.rounding import scale_and_zero, to_codes, whole, widen

MOST_VALUES = 16384  # of a token, groups padded to powers of two: at twice that, registers spill (by Triton 3.9, a few already do)


def modulate(x_BLC: torch.Tensor, scale_BC: torch.Tensor, shift_BC: torch.Tensor, form: CodeFormat, eps: float = 1e-6) -> affine.Quantized:
    """Codes uint8 [B·L, C], scale fp32 and zero_point uint8 [B·L, G]. int8 codes if `form` says shifted."""
    groups, group = _tile(x_BLC.shape[2], form.group_size)
    if groups * group > MOST_VALUES:
        raise ValueError(f"a token of {groups} groups of {group} (padded) is too long to modulate in one pass; the most is {MOST_VALUES} values")
    contiguous = (part.contiguous() for part in (x_BLC, scale_BC, shift_BC))
    return affine.Quantized(*modulate_activations(*contiguous, form.num_bits, form.group_size or 0, form.symmetric, eps, form.shifted))


def modulate_reference(x_BLC: torch.Tensor, scale_BC: torch.Tensor, shift_BC: torch.Tensor, form: CodeFormat, eps: float = 1e-6) -> affine.Quantized:
    """The same in plain torch, slow and obvious."""
    y = F.layer_norm(x_BLC.float(), x_BLC.shape[2:], eps=eps) * (1 + scale_BC.float()[:, None]) + shift_BC.float()[:, None]
    found = affine.quantize(y.flatten(0, 1), form.num_bits, form.group_size, form.symmetric)
    return found._replace(codes=(found.codes.int() - 128).to(torch.int8)) if form.shifted else found


@torch.library.custom_op("dite_kernels::modulate_activations", mutates_args=())
def modulate_activations(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, num_bits: int, group_size: int, symmetric: bool, eps: float, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator behind `modulate`, all contiguous; group_size 0 means whole rows, `shifted` gives int8 codes that are 128 less."""
    _, tokens, columns = x.shape
    outputs = like_quantized(x.flatten(0, 1), group_size, shifted)
    if not x.numel():
        return outputs
    group = affine.group_width(columns, group_size or None)
    groups = outputs[1].shape[1]
    tile_groups, tile_columns = _tile(columns, group_size or None)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _modulate[(x.shape[0] * tokens,)](
            x,
            scale,
            shift,
            *outputs,
            tokens,
            columns,
            group,
            groups,
            eps,
            LEVELS=2**num_bits - 1,
            SYMMETRIC=symmetric,
            SHIFT=128 if shifted else 0,
            GROUPS=tile_groups,
            COLUMNS=tile_columns,
            num_warps=warps(tile_groups * tile_columns),
            enable_fp_fusion=False,
        )
    return outputs


@modulate_activations.register_fake
def _(x, scale, shift, num_bits, group_size, symmetric, eps, shifted):
    return like_quantized(x.flatten(0, 1), group_size, shifted)


def _tile(columns: int, group_size: int | None) -> tuple[int, int]:
    groups, group = affine.group_count(columns, group_size), affine.group_width(columns, group_size)
    return triton.next_power_of_2(groups), triton.next_power_of_2(group)


def warps(values: int) -> int:
    """Warps for a token of `values`: up to 32 values a thread, which with their codes and modulation still fit its registers."""
    return max(1, min(32, values // 1024))


@triton.jit
def _modulate(
    x_ptr,
    modulation_ptr,
    shift_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    L,
    C,
    group,
    G,
    eps,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    sample = token // L
    groups, within = tl.arange(0, GROUPS), tl.arange(0, COLUMNS)
    columns = groups[:, None] * group + within[None, :]
    inside = (within[None, :] < group) & (columns < C)
    x = tl.load(x_ptr + token * C + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / C
    modulation = tl.load(modulation_ptr + sample * C + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * C + columns, mask=inside, other=0.0).to(tl.float32)
    y = centred * (1.0 / tl.sqrt_rn(variance + eps)) * (1.0 + modulation) + shift
    y = tl.where(inside, y, 0.0)
    none = tl.zeros([1, GROUPS], tl.float32)
    low, high, has_nan = widen(none, none, none.to(tl.int32), y[None, :, :])
    scale, zero = scale_and_zero(low, high, has_nan, LEVELS, SYMMETRIC)
    tl.store(scale_ptr + token * G + groups[None, :], scale, mask=groups[None, :] < G)
    tl.store(zero_ptr + token * G + groups[None, :], whole(zero), mask=groups[None, :] < G)
    codes = to_codes(y[None, :, :], scale[:, :, None], zero[:, :, None], LEVELS, SHIFT)
    codes = tl.reshape(codes, [GROUPS, COLUMNS]).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + token * C + columns, codes, mask=inside)
