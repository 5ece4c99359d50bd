/* What surrounds the linears of a block, each in one pass over memory:

       modulate    y[b, l] = (x[b, l] - mean) / sqrt(variance + eps) * (1 + scale[b]) + shift[b]     LayerNorm without weights, then adaLN
       add_gated   y[b, l] = x[b, l] + gate[b] * z[b, l]

   x, y, z [B, L, C] and scale, shift, gate [B, C] all fp32 or all bf16; arithmetic is fp32, rounded once. */

#pragma once
#include "activations.h"
#include "epilogue.h"

#ifdef __AVX512BW__

INLINE void store16(void *y, int type, int64_t at, __mmask16 mask, __m512 value) {
    if (type == FLOAT32) _mm512_mask_storeu_ps((float *)y + at, mask, value);
    else _mm256_mask_storeu_epi16((uint16_t *)y + at, mask, bf16_of(value));
}

INLINE void modulate_row(const void *x, const void *scale, const void *shift, void *y, int64_t row, int64_t vector, int64_t columns,
                         float eps, int type) {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int64_t c = 0; c < columns; c += 16) sum = _mm512_add_ps(sum, load16(x, type, row + c, first(columns - c)));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)columns);
    for (int64_t c = 0; c < columns; c += 16) {
        __m512 away = _mm512_maskz_sub_ps(first(columns - c), load16(x, type, row + c, first(columns - c)), mean);
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    __m512 inverse = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / (float)columns + eps));
    for (int64_t c = 0; c < columns; c += 16) {
        __mmask16 mask = first(columns - c);
        __m512 value = _mm512_mul_ps(_mm512_sub_ps(load16(x, type, row + c, mask), mean), inverse);
        __m512 factor = _mm512_add_ps(_mm512_set1_ps(1), load16(scale, type, vector + c, mask));
        store16(y, type, row + c, mask, _mm512_fmadd_ps(value, factor, load16(shift, type, vector + c, mask)));
    }
}

INLINE void gated_row(const void *x, const void *gate, const void *z, void *y, int64_t row, int64_t vector, int64_t columns, int type) {
    for (int64_t c = 0; c < columns; c += 16) {
        __mmask16 mask = first(columns - c);
        __m512 value = _mm512_fmadd_ps(load16(gate, type, vector + c, mask), load16(z, type, row + c, mask), load16(x, type, row + c, mask));
        store16(y, type, row + c, mask, value);
    }
}

#else

INLINE void put(void *y, int type, int64_t k, float value) {
    if (type == FLOAT32) ((float *)y)[k] = value;
    else ((uint16_t *)y)[k] = to_bf16(value);
}

INLINE void modulate_row(const void *x, const void *scale, const void *shift, void *y, int64_t row, int64_t vector, int64_t columns,
                         float eps, int type) {
    float sum = 0, squares = 0;
    for (int64_t c = 0; c < columns; c++) sum += at(x, type, row + c);
    float mean = sum / (float)columns;
    for (int64_t c = 0; c < columns; c++) {
        float away = at(x, type, row + c) - mean;
        squares += away * away;
    }
    float inverse = 1 / sqrtf(squares / (float)columns + eps);
    for (int64_t c = 0; c < columns; c++) {
        float value = (at(x, type, row + c) - mean) * inverse;
        put(y, type, row + c, value * (1 + at(scale, type, vector + c)) + at(shift, type, vector + c));
    }
}

INLINE void gated_row(const void *x, const void *gate, const void *z, void *y, int64_t row, int64_t vector, int64_t columns, int type) {
    for (int64_t c = 0; c < columns; c++) put(y, type, row + c, at(x, type, row + c) + at(gate, type, vector + c) * at(z, type, row + c));
}

#endif

/* `stride`: from one sample's scale (and shift, gate) to the next's; they are often slices of one tensor. */
void dite_modulate(const void *x, const void *scale, const void *shift, void *y, int64_t samples, int64_t tokens, int64_t columns, int64_t stride,
                   float eps, int32_t type, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < samples * tokens; m++) {
        if (type == FLOAT32) modulate_row(x, scale, shift, y, m * columns, m / tokens * stride, columns, eps, FLOAT32);
        else modulate_row(x, scale, shift, y, m * columns, m / tokens * stride, columns, eps, BFLOAT16);
    }
}

void dite_add_gated(const void *x, const void *gate, const void *z, void *y, int64_t samples, int64_t tokens, int64_t columns, int64_t stride,
                    int32_t type, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < samples * tokens; m++) {
        if (type == FLOAT32) gated_row(x, gate, z, y, m * columns, m / tokens * stride, columns, FLOAT32);
        else gated_row(x, gate, z, y, m * columns, m / tokens * stride, columns, BFLOAT16);
    }
}
