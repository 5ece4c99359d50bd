/* What the kernels are given, and the layouts that they work on. Shape letters: M tokens, N out features, K in features, G groups.

   Everything is cut into blocks of 64 tokens and panels of 64 columns, and each of these into groups, so that what one step of the product needs
   lies together:

       activations  uint8 [block][G][...]               AMX: [4 tiles][padded/64][16 rows][64 or 32]; otherwise [64 rows][padded]
       weights      int8  [panel][G][4][padded/4][16][4]    sixteen columns side by side, four consecutive k in each 32-bit lane
                    4 bits: two rows of 64 codes in one of 64 bytes, the earlier one in the low nibbles

   `padded` is the width of a group, rounded up to 32, 64 or multiples of 128 for AMX and to 8 otherwise; padding holds weights of value zero, so
   that what activations hold there does not matter. */

#pragma once
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))

enum { ROWS = 64, COLUMNS = 64, LANES = 16 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { OK = 0, NO_MEMORY = 1 };

/* A packed weight. A code stands for (w' - zero) * scale; w' is an int8. Arrays are [panel][G][64] of floats unless said otherwise. */
typedef struct {
    int64_t out_features, in_features, groups, width, padded;
    int32_t bits;       /* 4, or 8 for codes of a byte */
    int32_t offset;     /* added to w' of a byte to get its code; 6 and 8 bits */
    int32_t has_zero;   /* whether the epilogue subtracts zeros; those of 4 bits are subtracted while unpacking */
    uint8_t *codes;
    float *scale, *zero;
    float *sum;         /* sum over the group's columns of (w' - zero) */
    float *total;       /* [panel][64]: sum over groups of scale * sum */
} Weight;

/* One call: y [M, N] = quantized(x [M, K]) . weight + bias. `smooth` and `sign` are [K] or null; a block of 0 means no rotation. */
typedef struct {
    int64_t tokens;
    const void *x;
    void *y;
    const float *bias, *smooth, *sign;
    int64_t block;
    int32_t x_type, y_type;
    int32_t levels, per_group, symmetric; /* of the activations: 2^bits - 1; one range a (token, group) instead of a token */
    int32_t gelu;                         /* y = gelu(y), by its tanh approximation */
    int32_t threads;
} Call;

/* Quantized activations. Arrays are [block][G][64] with per_group, else [block][64]; `row_sum` always [block][G][64], only where zeros need it. */
typedef struct {
    uint8_t *codes;
    float *scale, *zero, *row_sum;
} Activations;

/* Where a block of results goes: `rows` x `columns` of them, at row stride `stride` (elements). `bias` is null or [64]. */
typedef struct {
    void *y;
    int64_t stride;
    int rows, columns, type, gelu;
    const float *bias;
} Target;

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes of a panel's codes as they are multiplied, and as they are stored. */
INLINE int64_t panel_bytes(const Weight *w) { return w->groups * w->padded * COLUMNS; }
INLINE int64_t stored_bytes(const Weight *w) { return w->bits == 4 ? panel_bytes(w) / 2 : panel_bytes(w); }

INLINE float from_bf16(uint16_t bits) {
    union { uint32_t i; float f; } value = {(uint32_t)bits << 16};
    return value.f;
}

INLINE uint16_t to_bf16(float x) {
    union { float f; uint32_t i; } value = {x};
    if (x != x) return (uint16_t)(value.i >> 16 | 0x40);
    return (uint16_t)((value.i + 0x7fff + (value.i >> 16 & 1)) >> 16); /* half to even */
}

/* x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is x (1 + tanh(...)) / 2 */
INLINE float gelu(float x) { return x / (1 + expf(-1.5957691216f * (x + 0.044715f * x * x * x))); }

/* A buffer of the calling thread's that grows and is kept until the thread ends: fresh pages would cost as much as a small product. Null when
   memory runs out. */
typedef struct { void *memory; size_t size; } Scratch;

static __thread Scratch shared_scratch, own_scratch; /* for all threads of a call, and for each of them */
static pthread_key_t at_exit;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void free_scratch(void *unused) {
    (void)unused;
    free(shared_scratch.memory);
    free(own_scratch.memory);
    shared_scratch = own_scratch = (Scratch){0, 0};
}

static void make_key(void) { pthread_key_create(&at_exit, free_scratch); }

static inline void *reserve(Scratch *scratch, size_t size) {
    if (scratch->size < size) {
        pthread_once(&once, make_key);
        pthread_setspecific(at_exit, scratch); /* any value but null has the destructor called */
        free(scratch->memory);
        scratch->size = (size + 4095) / 4096 * 4096;
        scratch->memory = aligned_alloc(4096, scratch->size);
        if (!scratch->memory) scratch->size = 0;
    }
    return scratch->memory;
}
