/* From int32 sums to results, sixteen columns at a time:

       part = acc - row_sum * zero                    row_sum * zero: of 8-bit weights that are not symmetric
       sums += part * w_scale                         ranges a token; then  y = x_scale * (sums - x_zero * total) + bias
       sums += (part - x_zero * sum) * x_scale * w_scale      ranges a (token, group); then  y = sums + bias

   Sums of groups of up to 128 columns are exact in fp32 as long as they are below 2^24. */

#pragma once
#include "types.h"

#ifdef __AVX512BW__

/* What the epilogue of one group of one column block multiplies with: [16] each. */
typedef struct { __m512 scale, zero, sum; } Factors;

/* Per row: pointers to [64] of this group (or of the token, without per_group). */
typedef struct { const float *scale, *zero, *row_sum; } Rows;

INLINE Factors factors(const Weight *w, int64_t at) {
    return (Factors){_mm512_loadu_ps(w->scale + at), _mm512_loadu_ps(w->zero + at), _mm512_loadu_ps(w->sum + at)};
}

INLINE Rows rows_of(const Weight *w, const Activations *x, int64_t block, int64_t group, int per_group) {
    int64_t at = (block * w->groups + group) * ROWS, token = per_group ? at : block * ROWS;
    return (Rows){x->scale + token, x->zero + token, x->row_sum + at};
}

/* acc's share of the sums, in units of the token's scale without per_group. */
INLINE __m512 scaled(__m512i acc, Factors f, Rows rows, int r, int per_group, int has_zero) {
    __m512 part = _mm512_cvtepi32_ps(acc);
    if (has_zero) part = _mm512_fnmadd_ps(_mm512_set1_ps(rows.row_sum[r]), f.zero, part);
    if (!per_group) return part;
    return _mm512_mul_ps(_mm512_fnmadd_ps(_mm512_set1_ps(rows.zero[r]), f.sum, part), _mm512_set1_ps(rows.scale[r]));
}

INLINE __m256i bf16_of(__m512 y) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(y);
#else
    __m512i wide = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(up);
#endif
}

/* 2^z for |z| <= 126, by a polynomial on [-1/2, 1/2] of relative error 1e-7. */
INLINE __m512 power_of_two(__m512 z) {
    __m512 whole = _mm512_roundscale_ps(z, 0), part = _mm512_sub_ps(z, whole);
    __m512 power = _mm512_fmadd_ps(part, _mm512_set1_ps(1.32187e-3f), _mm512_set1_ps(9.6717e-3f));
    power = _mm512_fmadd_ps(part, power, _mm512_set1_ps(5.550893e-2f));
    power = _mm512_fmadd_ps(part, power, _mm512_set1_ps(2.4022238e-1f));
    power = _mm512_fmadd_ps(part, power, _mm512_set1_ps(6.9314686e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(part, power, _mm512_set1_ps(1)), whole);
}

/* `gelu` of types.h, the quotient by one Newton step. */
INLINE __m512 gelu16(__m512 x) {
    __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1));
    __m512 z = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-1.5957691216f * 1.4426950409f));
    __m512 below = _mm512_add_ps(power_of_two(_mm512_min_ps(_mm512_max_ps(z, _mm512_set1_ps(-126)), _mm512_set1_ps(126))), _mm512_set1_ps(1));
    __m512 inverse = _mm512_rcp14_ps(below);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2)));
    return _mm512_mul_ps(x, inverse); /* of NaN: NaN */
}

/* Columns from `column` of row r; all sixteen of them if `full`. */
INLINE void write16(const Target *to, int r, int column, __m512 y, int full) {
    int64_t at = r * to->stride + column;
    __mmask16 mask = full ? 0xffff : (__mmask16)((1u << (to->columns - column)) - 1);
    if (to->type == FLOAT32) {
        if (full) _mm512_storeu_ps((float *)to->y + at, y);
        else _mm512_mask_storeu_ps((float *)to->y + at, mask, y);
    } else {
        if (full) _mm256_storeu_si256((__m256i *)((uint16_t *)to->y + at), bf16_of(y));
        else _mm256_mask_storeu_epi16((uint16_t *)to->y + at, mask, bf16_of(y));
    }
}

INLINE __m512 bias16(const Target *to, int column) {
    int left = to->columns - column;
    __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    return to->bias ? _mm512_maskz_loadu_ps(mask, to->bias + column) : _mm512_setzero_ps();
}

/* The last group's share, and the results: sixteen columns of `count` rows. */
INLINE void finish(const int32_t *acc, const float *sums, int r, int count, int column, Factors f, __m512 total, Rows rows,
                   const Target *to, int only, int per_group, int has_zero, int full) {
    __m512 bias = bias16(to, column);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        __m512 y = scaled(_mm512_load_si512(acc + i * 16), f, rows, r + i, per_group, has_zero);
        y = only ? _mm512_mul_ps(y, f.scale) : _mm512_fmadd_ps(y, f.scale, _mm512_load_ps(sums + i * 16));
        if (per_group) y = _mm512_add_ps(y, bias);
        else y = _mm512_fmadd_ps(_mm512_fnmadd_ps(_mm512_set1_ps(rows.zero[r + i]), total, y), _mm512_set1_ps(rows.scale[r + i]), bias);
        if (to->gelu) y = gelu16(y);
        write16(to, r + i, column, y, full);
    }
}

/* Sixteen columns of `count` rows from int32 sums [count][16]; `sums` [count][16] carries what earlier groups gave. */
INLINE void fold(const int32_t *acc, float *sums, int r, int count, int column, int group, const Weight *w, int64_t panel, Rows rows,
                 const Target *to, int per_group, int has_zero) {
    Factors f = factors(w, (panel * w->groups + group) * COLUMNS + column);
    if (group == w->groups - 1) {
        __m512 total = _mm512_loadu_ps(w->total + panel * COLUMNS + column);
        if (r + count <= to->rows && column + 16 <= to->columns && group)
            finish(acc, sums, r, count, column, f, total, rows, to, 0, per_group, has_zero, 1);
        else
            finish(acc, sums, r, (int)minimum(count, to->rows - r), column, f, total, rows, to, !group, per_group, has_zero,
                   column + 16 <= to->columns);
    } else if (group == 0) {
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            _mm512_store_ps(sums + i * 16, _mm512_mul_ps(scaled(_mm512_load_si512(acc + i * 16), f, rows, r + i, per_group, has_zero), f.scale));
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            __m512 part = scaled(_mm512_load_si512(acc + i * 16), f, rows, r + i, per_group, has_zero);
            _mm512_store_ps(sums + i * 16, _mm512_fmadd_ps(part, f.scale, _mm512_load_ps(sums + i * 16)));
        }
    }
}

#endif
