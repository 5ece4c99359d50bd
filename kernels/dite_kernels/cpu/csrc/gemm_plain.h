/* A block of 64 tokens times a panel of 64 columns for every other processor: 16-bit products with AVX2, else plain loops. */

#pragma once
#include "types.h"

INLINE int request_tiles(void) { return 0; }
INLINE void begin_tiles(const Weight *w) { (void)w; }
INLINE void end_tiles(void) {}

#ifdef __AVX2__

/* acc[16] += a[padded] . b[padded/4][16][4]: bytes widened to 16 bits, since vpmaddubsw would saturate. */
INLINE void dot16(const uint8_t *a, const int8_t *b, int64_t padded, int32_t *acc) {
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t k = 0; k < padded; k += 4, b += 64) {
        __m256i x = _mm256_cvtepu8_epi16(_mm_set1_epi32(*(const int32_t *)(a + k)));
        s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(x, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)b))));
        s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(x, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(b + 16)))));
        s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(x, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(b + 32)))));
        s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(x, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(b + 48)))));
    }
    /* Each column's sum lies in two neighbours; hadd leaves the 128-bit halves of two registers interleaved. */
    _mm256_storeu_si256((__m256i *)acc, _mm256_permute4x64_epi64(_mm256_hadd_epi32(s0, s1), 0xd8));
    _mm256_storeu_si256((__m256i *)(acc + 8), _mm256_permute4x64_epi64(_mm256_hadd_epi32(s2, s3), 0xd8));
}

#else

INLINE void dot16(const uint8_t *a, const int8_t *b, int64_t padded, int32_t *acc) {
    for (int c = 0; c < LANES; c++) acc[c] = 0;
    for (int64_t k = 0; k < padded; k += 4, b += 64)
        for (int c = 0; c < LANES; c++) acc[c] += a[k] * b[c * 4] + a[k + 1] * b[c * 4 + 1] + a[k + 2] * b[c * 4 + 2] + a[k + 3] * b[c * 4 + 3];
}

#endif

/* The arithmetic of epilogue.h. */
INLINE void block_plain(const Weight *w, const Activations *x, const uint8_t *left, const int8_t *right, int64_t block, int64_t panel,
                        const Target *to, int per_group, int has_zero) {
    for (int r = 0; r < to->rows; r++)
        for (int j = 0; j * LANES < to->columns; j++) {
            float sums[LANES] = {0};
            for (int64_t g = 0; g < w->groups; g++) {
                int32_t acc[LANES];
                int64_t row = (block * w->groups + g) * ROWS + r, at = (panel * w->groups + g) * COLUMNS + j * LANES;
                dot16(left + (g * ROWS + r) * w->padded, right + (g * 4 + j) * w->padded * LANES, w->padded, acc);
                for (int c = 0; c < LANES; c++) {
                    float part = (float)acc[c];
                    if (has_zero) part -= x->row_sum[row] * w->zero[at + c];
                    if (per_group) part = (part - x->zero[row] * w->sum[at + c]) * x->scale[row];
                    sums[c] += part * w->scale[at + c];
                }
            }
            int64_t token = block * ROWS + r, columns = minimum(LANES, to->columns - j * LANES);
            for (int c = 0; c < columns; c++) {
                int64_t column = j * LANES + c;
                float y = per_group ? sums[c] : x->scale[token] * (sums[c] - x->zero[token] * w->total[panel * COLUMNS + column]);
                if (to->bias) y += to->bias[column];
                if (to->gelu) y = gelu(y);
                if (to->type == FLOAT32) ((float *)to->y)[r * to->stride + column] = y;
                else ((uint16_t *)to->y)[r * to->stride + column] = to_bf16(y);
            }
        }
}

#define VARIANT(name, per_group, has_zero)                                                                                                      \
    static __attribute__((noinline)) void name(const Weight *w, const Activations *x, const uint8_t *left, const int8_t *right, int64_t block, \
                                               int64_t panel, const Target *to) {                                                               \
        block_plain(w, x, left, right, block, panel, to, per_group, has_zero);                                                                  \
    }
