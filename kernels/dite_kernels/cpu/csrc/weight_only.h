/* Few tokens in floats times packed codes, for layers whose activations are not quantized: conditioning layers see one row a sample.

       y[m, n] = sum over g of scale[n, g] * sum over k in g of x[m, k] * (w' - zero)[n, k]  + bias

   Bound by reading the codes, so these are read once for up to eight tokens. */

#pragma once
#include "types.h"

enum { FEW = 8 };

/* Sums of one group and 16 columns for `count` tokens; x [count] rows of floats at `stride`, codes as they are stored. */
INLINE void few_plain(const Weight *w, const uint8_t *codes, const float *zero, const float *x, int64_t stride, int64_t width, int count,
                      float (*sums)[LANES]) {
    for (int64_t k = 0; k < width; k++)
        for (int c = 0; c < LANES; c++) {
            int64_t at = k / 4 * 64 + c * 4 + k % 4;
            int code = w->bits == 4 ? codes[at / 128 * 64 + at % 64] >> at % 128 / 64 * 4 & 15 : (int8_t)codes[at];
            for (int m = 0; m < count; m++) sums[m][c] += x[m * stride + k] * ((float)code - zero[c]);
        }
}

#ifdef __AVX512BW__

/* Tokens past `count` repeat the last one. Each has several sums, so that no product waits for the one before. */
INLINE void some_tokens(const uint8_t *codes, const float *zero, const float *x, int64_t stride, int64_t width, int count,
                        float (*sums)[LANES], const int tokens, const int nibbles) {
    const int chains = tokens <= 2 ? 4 : FEW / tokens;
    __m512 s[4][FEW], z = _mm512_loadu_ps(zero);
    const float *rows[FEW];
    for (int m = 0; m < tokens; m++) {
        rows[m] = x + (m < count ? m : count - 1) * stride;
        for (int t = 0; t < chains; t++) s[t][m] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < width; k += 4) {
        __m512i lanes = _mm512_loadu_si512(nibbles ? codes + k / 8 * 64 : codes + k / 4 * 64);
        if (nibbles) lanes = _mm512_and_si512(k % 8 ? _mm512_srli_epi16(lanes, 4) : lanes, _mm512_set1_epi8(15));
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            if (k + t >= width) break;
            __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(lanes, 24 - 8 * t), 24); /* nibbles are positive bytes */
            __m512 weight = _mm512_sub_ps(_mm512_cvtepi32_ps(code), z);
#pragma GCC unroll 8
            for (int m = 0; m < tokens; m++)
                s[t % chains][m] = _mm512_fmadd_ps(weight, _mm512_set1_ps(rows[m][k + t]), s[t % chains][m]);
        }
    }
    for (int m = 0; m < count; m++) {
        for (int t = 1; t < chains; t++) s[0][m] = _mm512_add_ps(s[0][m], s[t][m]);
        _mm512_storeu_ps(sums[m], s[0][m]);
    }
}

INLINE void few_tokens(const Weight *w, const uint8_t *codes, const float *zero, const float *x, int64_t stride, int64_t width, int count,
                       float (*sums)[LANES]) {
#define CASE(most, nibbles) some_tokens(codes, zero, x, stride, width, count, sums, most, nibbles)
    if (w->bits == 4) count <= 1 ? CASE(1, 1) : count <= 2 ? CASE(2, 1) : count <= 4 ? CASE(4, 1) : CASE(FEW, 1);
    else count <= 1 ? CASE(1, 0) : count <= 2 ? CASE(2, 0) : count <= 4 ? CASE(4, 0) : CASE(FEW, 0);
#undef CASE
}

#else
#define few_tokens few_plain
#endif

/* y = x . weight + bias with x [tokens, K] and y [tokens, N] fp32, for any number of tokens; meant for few. */
void dite_weight_only(const Weight *w, const float *x, float *y, const float *bias, int64_t tokens, int32_t threads) {
    int64_t panels = divide_up(w->out_features, COLUMNS);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t work = 0; work < panels * 4; work++) {
        int64_t panel = work / 4, j = work % 4, column = panel * COLUMNS + j * LANES;
        for (int64_t from = 0; from < tokens && column < w->out_features; from += FEW) {
            int count = (int)minimum(FEW, tokens - from);
            float total[FEW][LANES] = {{0}};
            for (int64_t g = 0; g < w->groups; g++) {
                float sums[FEW][LANES] = {{0}};
                int64_t at = (panel * w->groups + g) * COLUMNS + j * LANES, start = g * w->width;
                const uint8_t *codes = w->codes + ((panel * w->groups + g) * 4 + j) * w->padded * LANES / (w->bits == 4 ? 2 : 1);
                few_tokens(w, codes, w->zero + at, x + from * w->in_features + start, w->in_features, minimum(w->width, w->in_features - start),
                           count, sums);
                for (int m = 0; m < count; m++)
                    for (int c = 0; c < LANES; c++) total[m][c] += sums[m][c] * w->scale[at + c];
            }
            for (int m = 0; m < count; m++)
                for (int c = 0; c < minimum(LANES, w->out_features - column); c++)
                    y[(from + m) * w->out_features + column + c] = total[m][c] + (bias ? bias[column + c] : 0);
        }
    }
}
