/* Weights between the order on disk and the panels that are multiplied. Slow and plain: done once a layer. */

#pragma once
#include "types.h"

INLINE int64_t place(const Weight *w, int64_t n, int64_t group, int64_t k) {
    int64_t block = ((n / COLUMNS * w->groups + group) * 4 + n % COLUMNS / LANES) * w->padded * LANES;
    return block + k / 4 * 64 + n % LANES * 4 + k % 4;
}

INLINE int64_t fact(const Weight *w, int64_t n, int64_t group) { return (n / COLUMNS * w->groups + group) * COLUMNS + n % COLUMNS; }

INLINE int64_t nibble_byte(int64_t at) { return at / 128 * 64 + at % 64; }
INLINE int nibble_shift(int64_t at) { return at % 128 / 64 * 4; }

/* codes, zero uint8 and scale fp32, [N, K] and [N, G] as the checkpoint has them; the arrays of `w` must hold zeros. */
void dite_pack(Weight *w, const uint8_t *codes, const uint8_t *zero, const float *scale, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < divide_up(w->out_features, COLUMNS); panel++) {
        int64_t end = minimum(w->out_features, (panel + 1) * COLUMNS);
        for (int64_t n = panel * COLUMNS; n < end; n++) {
            for (int64_t g = 0; g < w->groups; g++) {
                int z = zero[n * w->groups + g], value = z - w->offset, sum = 0;
                int64_t width = minimum(w->width, w->in_features - g * w->width);
                for (int64_t k = 0; k < w->padded; k++) {
                    int code = k < width ? codes[n * w->in_features + g * w->width + k] : z;
                    int64_t at = place(w, n, g, k);
                    if (w->bits == 4) w->codes[nibble_byte(at)] |= code << nibble_shift(at);
                    else w->codes[at] = k < width ? code - w->offset : 0;
                    sum += code - z;
                }
                w->scale[fact(w, n, g)] = scale[n * w->groups + g];
                w->zero[fact(w, n, g)] = w->bits == 4 ? z : value;
                w->sum[fact(w, n, g)] = sum;
                w->total[n] += scale[n * w->groups + g] * sum;
            }
        }
    }
}

/* The codes uint8 [N, K] that were packed. */
void dite_unpack(const Weight *w, uint8_t *codes, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < w->out_features; n++)
        for (int64_t k = 0; k < w->in_features; k++) {
            int64_t at = place(w, n, k / w->width, k % w->width);
            codes[n * w->in_features + k] = w->bits == 4 ? w->codes[nibble_byte(at)] >> nibble_shift(at) & 15 : w->codes[at] + w->offset;
        }
}

/* A panel of 4-bit codes as the int8 that are multiplied. */
INLINE void expand_panel(const Weight *w, int64_t panel, int8_t *out) {
    const uint8_t *in = w->codes + panel * stored_bytes(w);
    const float *zero = w->zero + panel * w->groups * COLUMNS;
    for (int64_t block = 0; block < w->groups * 4; block++, zero += LANES) {
#ifdef __AVX512BW__
        __m512i z = _mm512_mullo_epi32(_mm512_cvtps_epi32(_mm512_loadu_ps(zero)), _mm512_set1_epi32(0x01010101)), low = _mm512_set1_epi8(15);
        for (int64_t pair = 0; pair < w->padded / 8; pair++, in += 64, out += 128) {
            __m512i both = _mm512_loadu_si512(in);
            _mm512_storeu_si512(out, _mm512_sub_epi8(_mm512_and_si512(both, low), z));
            _mm512_storeu_si512(out + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), z));
        }
#else
        int8_t z[64];
        for (int i = 0; i < 64; i++) z[i] = (int8_t)zero[i / 4];
        for (int64_t pair = 0; pair < w->padded / 8; pair++, in += 64, out += 128)
            for (int i = 0; i < 64; i++) {
                out[i] = (int8_t)((in[i] & 15) - z[i]);
                out[64 + i] = (int8_t)((in[i] >> 4) - z[i]);
            }
#endif
    }
}
