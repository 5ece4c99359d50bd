/* Activations: smooth, rotate, then quantize each token (or each group of a token) to codes and a scale, exactly as dite_kernels.affine does:

       low, high = min(x, 0), max(x, 0)      scale = (high - low) / levels, 1 if that is 0
       zero = round(-low / scale)            code = clamp(round(x / scale) + zero, 0, levels)          half to even, true division

   A range that holds NaN or inf gets a NaN scale and codes of 0, so that it poisons its own token only. */

#pragma once
#include "types.h"

typedef struct { float scale, zero; } Range;

INLINE Range range_of(float low, float high, const Call *call) {
    float levels = (float)call->levels, middle = (float)(call->levels / 2), scale;
    low = low < 0 ? low : 0;
    high = high > 0 ? high : 0;
    scale = call->symmetric ? (-low > high ? -low : high) / middle : (high - low) / levels;
    if (!(scale <= 3.402823466e38f)) return (Range){NAN, 0};
    if (scale == 0) scale = 1;
    if (call->symmetric) return (Range){scale, middle + 1};
    float zero = nearbyintf(-low / scale);
    return (Range){scale, zero > levels ? levels : zero};
}

/* y = H x in place: 2^n floats, unnormalised. */
INLINE void plain_butterflies(float *x, int64_t width) {
    for (int64_t half = 1; half < width; half *= 2)
        for (int64_t i = 0; i < width; i += 2 * half)
            for (int64_t k = i; k < i + half; k++) {
                float a = x[k], b = x[k + half];
                x[k] = a + b;
                x[k + half] = a - b;
            }
}

#ifdef __AVX512BW__

INLINE __m512 load16(const void *x, int type, int64_t at, __mmask16 mask) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)x + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + at)), 16));
}

INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0; }

/* bf16 numbers in the order of their bits read as integers, NaN outside of everything; its own inverse. */
INLINE __m512i ordered(__m512i bits) {
    return _mm512_ternarylogic_epi32(bits, _mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7fff), 0x78); /* bits ^ (sign & 0x7fff) */
}

INLINE Range measure_bf16(const uint16_t *x, int64_t count, const Call *call) {
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int64_t k = 0; k < count; k += 32) {
        __mmask32 mask = count - k >= 32 ? 0xffffffffu : (1u << (count - k)) - 1;
        __m512i value = ordered(_mm512_maskz_loadu_epi16(mask, x + k));
        low = _mm512_min_epi16(low, value);
        high = _mm512_max_epi16(high, value);
    }
    /* Even and odd halves as 32-bit integers, which there are reductions of. */
    int least = _mm512_reduce_min_epi32(_mm512_min_epi32(_mm512_srai_epi32(low, 16), _mm512_srai_epi32(_mm512_slli_epi32(low, 16), 16)));
    int most = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_srai_epi32(high, 16), _mm512_srai_epi32(_mm512_slli_epi32(high, 16), 16)));
    float bottom = from_bf16((uint16_t)(least ^ (least >> 15 & 0x7fff))), top = from_bf16((uint16_t)most);
    return bottom != bottom || top != top ? (Range){NAN, 0} : range_of(bottom, top, call);
}

INLINE Range measure(const void *x, int type, int64_t start, int64_t count, const Call *call) {
    if (type == BFLOAT16) return measure_bf16((const uint16_t *)x + start, count, call);
    __m512 low = _mm512_setzero_ps(), high = low;
    __mmask16 nan = 0;
    for (int64_t k = 0; k < count; k += 16) {
        __m512 value = load16(x, type, start + k, first(count - k));
        low = _mm512_min_ps(low, value);
        high = _mm512_max_ps(high, value);
        nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    return nan ? (Range){NAN, 0} : range_of(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), call);
}

/* round(x / scale): the reciprocal's quotient, corrected once, is the correctly rounded one (Markstein) unless something under- or overflows. */
INLINE __m512i quotient(__m512 x, __m512 scale, __m512 inverse, int ordinary) {
    if (!ordinary) return _mm512_cvtps_epi32(_mm512_div_ps(x, scale));
    __m512 near = _mm512_mul_ps(x, inverse);
    return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_fnmadd_ps(near, scale, x), inverse, near));
}

/* What encoding with one range needs. */
typedef struct { __m512 scale, inverse; __m512i zero, most; int ordinary, poisoned; } Encoder;

INLINE Encoder encoder(Range range, int levels) {
    return (Encoder){_mm512_set1_ps(range.scale), _mm512_set1_ps(1 / range.scale), _mm512_set1_epi16((int16_t)range.zero),
                     _mm512_set1_epi8((char)levels), range.scale > 1e-30f && range.scale < 1e30f, range.scale != range.scale};
}

/* 64 codes; of those beyond `left`, zeros. */
INLINE __m512i encode64(const void *x, int type, int64_t at, int64_t left, const Encoder *e, int ordinary) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); /* undoes the lanes of the packs */
    __m512i a = quotient(load16(x, type, at, first(left)), e->scale, e->inverse, ordinary);
    __m512i b = quotient(load16(x, type, at + 16, first(left - 16)), e->scale, e->inverse, ordinary);
    __m512i c = quotient(load16(x, type, at + 32, first(left - 32)), e->scale, e->inverse, ordinary);
    __m512i d = quotient(load16(x, type, at + 48, first(left - 48)), e->scale, e->inverse, ordinary);
    __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(a, b), e->zero), high = _mm512_adds_epi16(_mm512_packs_epi32(c, d), e->zero);
    __m512i codes = _mm512_permutexvar_epi32(order, _mm512_min_epu8(_mm512_packus_epi16(low, high), e->most));
    return left < 64 ? _mm512_maskz_mov_epi8((1ull << left) - 1, codes) : codes;
}

/* Codes of `count` columns from `start` into out, 64 at a time at distances of `stride` bytes; returns their sum if it is asked for. */
INLINE int64_t encode(const void *x, int type, int64_t start, int64_t count, const Encoder *e, uint8_t *out, int64_t stride, int summed) {
    __m512i sums = _mm512_setzero_si512(), codes;
    for (int64_t k = 0; k < count; k += 64, out += stride) {
        int64_t left = count - k;
        if (e->poisoned) codes = _mm512_setzero_si512();
        else if (left >= 64 && e->ordinary) codes = encode64(x, type, start + k, 64, e, 1);
        else codes = encode64(x, type, start + k, left, e, e->ordinary);
        if (left >= 64) _mm512_storeu_si512(out, codes);
        else _mm512_mask_storeu_epi8(out, (1ull << left) - 1, codes);
        if (summed) sums = _mm512_add_epi64(sums, _mm512_sad_epu8(codes, _mm512_setzero_si512()));
    }
    return summed ? _mm512_reduce_add_epi64(sums) : 0;
}

INLINE void butterflies(float *x, int64_t width) {
    if (width < 16) {
        plain_butterflies(x, width);
        return;
    }
    const __m512 near = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
    const __m512 pairs = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
    const __m512 fours = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
    const __m512 eights = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        v = _mm512_fmadd_ps(v, near, _mm512_permute_ps(v, 0xb1));
        v = _mm512_fmadd_ps(v, pairs, _mm512_permute_ps(v, 0x4e));
        v = _mm512_fmadd_ps(v, fours, _mm512_shuffle_f32x4(v, v, 0xb1));
        v = _mm512_fmadd_ps(v, eights, _mm512_shuffle_f32x4(v, v, 0x4e));
        _mm512_storeu_ps(x + i, v);
    }
    for (int64_t half = 16; half < width; half *= 2)
        for (int64_t i = 0; i < width; i += 2 * half)
            for (int64_t k = i; k < i + half; k += 16) {
                __m512 a = _mm512_loadu_ps(x + k), b = _mm512_loadu_ps(x + k + half);
                _mm512_storeu_ps(x + k, _mm512_add_ps(a, b));
                _mm512_storeu_ps(x + k + half, _mm512_sub_ps(a, b));
            }
}

#else

#define butterflies plain_butterflies

INLINE float at(const void *x, int type, int64_t k) { return type == FLOAT32 ? ((const float *)x)[k] : from_bf16(((const uint16_t *)x)[k]); }

INLINE Range measure(const void *x, int type, int64_t start, int64_t count, const Call *call) {
    float low = 0, high = 0;
    int nan = 0;
    for (int64_t k = start; k < start + count; k++) {
        float value = at(x, type, k);
        low = value < low ? value : low;
        high = value > high ? value : high;
        nan |= value != value;
    }
    return nan ? (Range){NAN, 0} : range_of(low, high, call);
}

typedef struct { Range range; int levels; } Encoder;

INLINE Encoder encoder(Range range, int levels) { return (Encoder){range, levels}; }

INLINE int64_t encode(const void *x, int type, int64_t start, int64_t count, const Encoder *e, uint8_t *out, int64_t stride, int summed) {
    int64_t sum = 0;
    (void)stride, (void)summed; /* without tiles, 64 codes follow the 64 before them */
    for (int64_t k = 0; k < count; k++) {
        float code = e->range.scale != e->range.scale ? 0 : nearbyintf(at(x, type, start + k) / e->range.scale) + e->range.zero;
        out[k] = (uint8_t)(code < 0 ? 0 : code > e->levels ? e->levels : code);
        sum += out[k];
    }
    return sum;
}

#endif

/* One row, smoothed and rotated, as floats in `out`: blocks of `block` columns as long as they fit, then of ever smaller powers of two. */
INLINE void transform_row(const Call *call, const Weight *w, int64_t m, float *out) {
    int64_t columns = w->in_features, start = m * columns, done = 0;
    for (int64_t k = 0; k < columns; k++) {
        float x = call->x_type == FLOAT32 ? ((const float *)call->x)[start + k] : from_bf16(((const uint16_t *)call->x)[start + k]);
        if (call->smooth) x *= call->smooth[k];
        out[k] = call->sign ? x * call->sign[k] : x;
    }
    for (int64_t block = call->block; block > 1; block /= 2)
        for (; columns - done >= block; done += block) {
            float scale = 1 / sqrtf((float)block);
            butterflies(out + done, block);
            for (int64_t k = done; k < done + block; k++) out[k] *= scale;
        }
}

/* Quantizes token m; `row` has room for a row of floats. */
INLINE void quantize_row(const Call *call, const Weight *w, int64_t m, const void *x, int type, int64_t start, Activations *out) {
    int64_t block = m / ROWS, r = m % ROWS, groups = w->groups;
    Encoder e;
    if (!call->per_group) {
        Range range = measure(x, type, start, w->in_features, call);
        out->scale[m] = range.scale;
        out->zero[m] = range.zero;
        e = encoder(range, call->levels);
    }
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = (block * groups + g) * ROWS + r, first_column = g * w->width, count = minimum(w->width, w->in_features - first_column);
        if (call->per_group) {
            Range range = measure(x, type, start + first_column, count, call);
            out->scale[at] = range.scale;
            out->zero[at] = range.zero;
            e = encoder(range, call->levels);
        }
#ifdef __AMX_INT8__
        uint8_t *codes = out->codes + ((block * groups + g) * ROWS + r / 16 * 16) * w->padded + r % 16 * minimum(64, w->padded);
        int64_t sum = encode(x, type, start + first_column, count, &e, codes, 1024, w->has_zero);
#else
        uint8_t *codes = out->codes + at * w->padded;
        int64_t sum = encode(x, type, start + first_column, count, &e, codes, 64, w->has_zero);
#endif
        if (w->has_zero) out->row_sum[at] = (float)sum;
    }
}

INLINE void quantize_token(const Call *call, const Weight *w, int64_t m, float *row, Activations *out) {
    int64_t start = m * w->in_features;
    if (call->smooth || call->block) {
        transform_row(call, w, m, row);
        quantize_row(call, w, m, row, FLOAT32, 0, out);
    } else if (call->x_type == FLOAT32) {
        quantize_row(call, w, m, call->x, FLOAT32, start, out);
    } else {
        quantize_row(call, w, m, call->x, BFLOAT16, start, out);
    }
}
