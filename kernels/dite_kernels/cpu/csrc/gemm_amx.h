/* A block of 64 tokens times a panel of 64 columns with AMX tiles: 16 rows of 64 bytes each.

   What limits it is not the multiplying but moving sums from tiles to floats, once a group: 16 columns of it take as many stores and loads as
   the product of a group of 128 has time for. So the order of instructions below matters: a tile is stored only when the next one is due in its
   place, and sums are folded in one column later, between tile products that don't wait for them. Measured: twice as fast as storing at once. */

#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "epilogue.h"

enum { TILE = 1024, TILE_SUMS = 256 }; /* bytes, and int32 sums, of a tile */

/* Registers; the instructions take literals. */
#define LEFT0 0
#define LEFT1 1
#define LEFT2 2
#define LEFT3 3
#define SUMS0 4
#define SUMS1 5
#define RIGHT0 6
#define RIGHT1 7

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* Asks Linux for the tiles; 0 where it gives them. */
INLINE int request_tiles(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

/* Groups of up to 32 columns take half a tile, which the same registers then are. */
INLINE void begin_tiles(const Weight *w) {
    TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    if (w->padded == 32) {
        shapes.row_bytes[LEFT0] = shapes.row_bytes[LEFT2] = 32;
        shapes.rows[RIGHT0] = 8;
    }
    _tile_loadconfig(&shapes);
}

INLINE void end_tiles(void) { _tile_release(); }

/* Sums of 32 rows of one column block, stored at `sums`, and whether they are all of their group's. */
typedef struct { int32_t *sums; int group, pair, column, whole; } Pending;

/* `part`: columns of a group that are multiplied at once, 32, 64 or 128; the tokens' tiles of these stay in registers while the weight's columns
   pass. The sums of a `wide` group, which has several parts of 128, wait in memory from one part to the next. */
INLINE void block_amx(const Weight *w, const Activations *x, const uint8_t *left, const int8_t *right, int64_t block, int64_t panel, const Target *to,
                      int part, int wide, int per_group, int has_zero) {
    const int tiles = part == 128 ? 2 : 1, row = part < 64 ? part : 64, tile = 16 * row, parts = wide ? (int)(w->padded / 128) : 1;
    float sums[4 * 2 * 2 * TILE_SUMS] __attribute__((aligned(64)));
    int32_t kept[wide ? 16 : 2][2 * TILE_SUMS] __attribute__((aligned(64))); /* for two columns; or for two groups, of 2 pairs of rows by 4 columns */
    int pairs = (to->rows + 31) / 32, columns = (to->columns + 15) / 16, step = 0;
    Pending one = {kept[0], 0, 0, 0, 0}, two = one; /* one and two columns ago */
#define FOLD(half)                                                                                                                                \
    fold(two.sums + (half) * TILE_SUMS, sums + ((two.pair * 4 + two.column) * 2 + (half)) * TILE_SUMS, two.pair * 32 + (half) * 16, 16,           \
         two.column * 16, two.group, w, panel, rows_of(w, x, block, two.group, per_group), to, per_group, has_zero)
    for (int g = 0; g < (int)w->groups; g++)
        for (int p = 0; p < parts; p++)
            for (int pair = 0; pair < pairs; pair++) {
                const uint8_t *a = left + ((g * 4 + pair * 2) * parts + p) * tiles * tile, *below = a + parts * tiles * tile;
                _tile_loadd(LEFT0, a, row);
                _tile_loadd(LEFT2, below, row);
                if (tiles == 2) _tile_loadd(LEFT1, a + tile, 64);
                if (tiles == 2) _tile_loadd(LEFT3, below + tile, 64);
                for (int column = 0; column < columns; column++, step++) {
                    const int8_t *b = right + ((g * 4 + column) * parts + p) * tiles * tile;
                    int32_t *slot = wide ? kept[(g & 1) * 8 + pair * 4 + column] : kept[step & 1];
                    _tile_loadd(RIGHT0, b, 64);
                    if (tiles == 2) _tile_loadd(RIGHT1, b + tile, 64);
                    if (step) _tile_stored(SUMS0, one.sums, 64);
                    if (p) _tile_loadd(SUMS0, slot, 64);
                    else _tile_zero(SUMS0);
                    _tile_dpbusd(SUMS0, LEFT0, RIGHT0);
                    if (tiles == 2) _tile_dpbusd(SUMS0, LEFT1, RIGHT1);
                    if (two.whole) FOLD(0);
                    if (step) _tile_stored(SUMS1, one.sums + TILE_SUMS, 64);
                    if (p) _tile_loadd(SUMS1, slot + TILE_SUMS, 64);
                    else _tile_zero(SUMS1);
                    _tile_dpbusd(SUMS1, LEFT2, RIGHT0);
                    if (tiles == 2) _tile_dpbusd(SUMS1, LEFT3, RIGHT1);
                    if (two.whole) FOLD(1);
                    two = one;
                    one = (Pending){slot, g, pair, column, p == parts - 1};
                }
            }
    _tile_stored(SUMS0, one.sums, 64);
    _tile_stored(SUMS1, one.sums + TILE_SUMS, 64);
    for (int i = 0; i < 2; i++, two = one)
        if (two.whole) {
            FOLD(0);
            FOLD(1);
        }
#undef FOLD
}

#define VARIANT(name, per_group, has_zero)                                                                                                          \
    static __attribute__((noinline)) void name(const Weight *w, const Activations *x, const uint8_t *left, const int8_t *right, int64_t block,     \
                                               int64_t panel, const Target *to) {                                                                   \
        if (w->padded == 32) block_amx(w, x, left, right, block, panel, to, 32, 0, per_group, has_zero);                                            \
        else if (w->padded == 64) block_amx(w, x, left, right, block, panel, to, 64, 0, per_group, has_zero);                                       \
        else if (w->padded == 128) block_amx(w, x, left, right, block, panel, to, 128, 0, per_group, has_zero);                                     \
        else block_amx(w, x, left, right, block, panel, to, 128, 1, per_group, has_zero);                                                           \
    }
