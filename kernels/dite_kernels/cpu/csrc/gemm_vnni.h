/* A block of 64 tokens times a panel of 64 columns with vpdpbusd: 6 rows by 4 vectors of sums in registers, folded in once a group. */

#pragma once
#include "epilogue.h"

INLINE int request_tiles(void) { return 0; }
INLINE void begin_tiles(const Weight *w) { (void)w; }
INLINE void end_tiles(void) {}

enum { STEP = 6 };

/* An array of vectors would be spilled to memory at every step by some compilers; named ones are not. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define CLEAR(r) __m512i s##r##0 = _mm512_setzero_si512(), s##r##1 = s##r##0, s##r##2 = s##r##0, s##r##3 = s##r##0;
#define MULTIPLY(r)                                                                 \
    x = _mm512_set1_epi32(*(const int32_t *)(a + (r) * padded + k * 4));            \
    asm("vpdpbusd %1, %2, %0" : "+v"(s##r##0) : "v"(b0), "v"(x));                   \
    asm("vpdpbusd %1, %2, %0" : "+v"(s##r##1) : "v"(b1), "v"(x));                   \
    asm("vpdpbusd %1, %2, %0" : "+v"(s##r##2) : "v"(b2), "v"(x));                   \
    asm("vpdpbusd %1, %2, %0" : "+v"(s##r##3) : "v"(b3), "v"(x));
#define KEEP(r)                                                  \
    _mm512_store_si512(acc + 0 * STEP * 16 + (r) * 16, s##r##0); \
    _mm512_store_si512(acc + 1 * STEP * 16 + (r) * 16, s##r##1); \
    _mm512_store_si512(acc + 2 * STEP * 16 + (r) * 16, s##r##2); \
    _mm512_store_si512(acc + 3 * STEP * 16 + (r) * 16, s##r##3);

INLINE void block_vnni(const Weight *w, const Activations *x_, const uint8_t *left, const int8_t *right, int64_t block, int64_t panel,
                       const Target *to, int per_group, int has_zero) {
    float sums[(ROWS + STEP) * COLUMNS] __attribute__((aligned(64)));
    int32_t acc[4 * STEP * 16] __attribute__((aligned(64)));
    int64_t padded = w->padded, column = padded * 16;
    for (int g = 0; g < (int)w->groups; g++) {
        Rows rows = rows_of(w, x_, block, g, per_group);
        for (int row = 0; row < to->rows; row += STEP) {
            const uint8_t *a = left + (g * ROWS + row) * padded; /* rows past the block are other groups' or spare: read, never written */
            const int8_t *b = right + g * 4 * column;
            EACH_ROW(CLEAR)
            for (int64_t k = 0; k < padded / 4; k++, b += 64) {
                __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + column);
                __m512i b2 = _mm512_loadu_si512(b + 2 * column), b3 = _mm512_loadu_si512(b + 3 * column), x;
                EACH_ROW(MULTIPLY)
            }
            EACH_ROW(KEEP)
            int count = ROWS - row < STEP ? ROWS - row : STEP;
            for (int j = 0; j * 16 < to->columns; j++)
                fold(acc + j * STEP * 16, sums + (j * (ROWS + STEP) + row) * 16, row, count, j * 16, g, w, panel, rows, to, per_group, has_zero);
        }
    }
}

#define VARIANT(name, per_group, has_zero)                                                                                                      \
    static __attribute__((noinline)) void name(const Weight *w, const Activations *x, const uint8_t *left, const int8_t *right, int64_t block, \
                                               int64_t panel, const Target *to) {                                                               \
        block_vnni(w, x, left, right, block, panel, to, per_group, has_zero);                                                                   \
    }
