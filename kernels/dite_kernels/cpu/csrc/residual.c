/* The residual codecs of dite_kernels/codec.py, which has their formulas, byte for byte; one pass over memory.

   Every product and sum must be rounded by itself here: this file is compiled on its own, with -ffp-contract=off. What a group of 64 needs is in
   residual_avx512.h, residual_avx2.h, or in loops that compilers vectorise, residual_plain.h; this file has what a group does once, and shares groups out. */

#include "residual.h"

#ifdef __AVX512BW__
#include "residual_avx512.h"
#elif defined(__AVX2__) && defined(__F16C__)
#include "residual_avx2.h"
#else
#include "residual_plain.h"
#endif

static const float SMALLEST = 0x1p-40f, HALF_MAX = 65504;
enum { HALF_NAN = 0x7e00, INFINITE = 0x7f800000, BATCH = 8 };

/* What |d| is multiplied with before whole numbers are summed; 2 bits and 1. */
INLINE float step_of(float largest, int bits) { return (bits == 2 ? 0x1p12f : 0x1p15f) / (largest > SMALLEST ? largest : SMALLEST); }

/* The fp16 scale of a group of finite numbers, from the largest |d|, or from the sum over round(|d| step), of 2 bits their squares. */
INLINE uint16_t scale_of(float largest, int32_t whole, int count, int bits) {
    if (bits >= 4) {
        float scale = largest / (float)((1 << (bits - 1)) - 1);
        scale = scale < HALF_MAX ? scale : HALF_MAX;
        uint16_t half = to_half(scale);
        return half + (from_half(half) < scale); /* bits of positive halves are ordered like the numbers; no branch, half of them would be missed */
    }
    float step = step_of(largest, bits), sum = (float)whole;
    float scale = bits == 2 ? sqrtf(sum / (float)count) / step : sum / (step * (float)count);
    return to_half(scale < HALF_MAX ? scale : HALF_MAX);
}

/* A group's places: of its first element in each tensor, of its codes and its scale. */
typedef struct {
    const char *x;
    char *ref, *delta;
    uint8_t *codes, *scale;
    float beta;
} Group;

/* `many` groups of `count` numbers, step by step for all: in one group each step waits for the one before. Beyond `count` everything is zero, and so is
   d; but for a beta that is not finite, and poisons the group as it is. */
INLINE void encode_groups(const Residual *r, Group at, int bits, int many, int count) {
    Values d[BATCH];
    int32_t largest[BATCH], whole[BATCH] = {0};
    char poisoned[BATCH] = {0};
    uint16_t scale[BATCH];
    int64_t x_size = GROUP * size_of(r->x_type), ref_size = GROUP * size_of(r->ref_type);
    int finite = 1; /* all of them, which they usually are */
    for (int i = 0; i < many; i++) {
        Values ref = load(at.ref + i * ref_size, r->ref_type, count), x = load(at.x + i * x_size, r->x_type, count);
        if (r->delta) {
            Values delta = load(at.delta + i * ref_size, r->ref_type, count);
            ref = predicted(&ref, &delta, at.beta);
        }
        d[i] = difference(&x, &ref);
        largest[i] = largest_bits(&d[i]);
        finite &= largest[i] < INFINITE;
    }
    for (int i = 0; i < many && !finite; i++) {
        poisoned[i] = largest[i] >= INFINITE;
        if (!poisoned[i]) continue;
        d[i] = zeros();
        largest[i] = 0;
    }
    for (int i = 0; i < many && bits < 4; i++) whole[i] = whole_sum(&d[i], step_of(float_of((uint32_t)largest[i]), bits), bits == 2);
    for (int i = 0; i < many; i++) scale[i] = scale_of(float_of((uint32_t)largest[i]), whole[i], count, bits);
    for (int i = 0; i < many; i++) pack(at.codes + i * GROUP / 8 * bits, &d[i], from_half(scale[i]), bits);
    for (int i = 0; i < many && !finite; i++)
        if (poisoned[i]) scale[i] = HALF_NAN;
    memcpy(at.scale, scale, 2 * (size_t)many);
}

/* NaN is written as one pattern of bits, whichever operand it came from: ranks compare their references by hash. */
INLINE void decode_group(const Residual *r, Group at, int bits, int count) {
    uint16_t half;
    memcpy(&half, at.scale, 2);
    Values ref = load(at.ref, r->ref_type, count), from = ref;
    if (r->delta) {
        Values delta = load(at.delta, r->ref_type, count);
        from = predicted(&ref, &delta, at.beta);
    }
    Values new = sum_with_codes(&from, at.codes, from_half(half), bits), held = store(at.ref, r->ref_type, &new, count);
    if (r->delta) {
        Values change = difference(&held, &ref);
        store(at.delta, r->ref_type, &change, count);
    }
}

/* Groups [from, end) of all, counted through the rows. `bits` and `decode` are known when this is compiled. */
INLINE void groups(const Residual *r, int64_t from, int64_t end, int bits, int decode) {
    int64_t in_row = divide_up(r->columns, GROUP), x_size = size_of(r->x_type), ref_size = size_of(r->ref_type);
    while (from < end) {
        int64_t row = from / in_row, sample = row / r->tokens, token = row % r->tokens, last = minimum(end, (row + 1) * in_row);
        int64_t column = (from - row * in_row) * GROUP;
        Group at = {(const char *)r->x + (sample * r->x_strides[0] + token * r->x_strides[1] + column) * x_size,
                    (char *)r->ref + (sample * r->ref_strides[0] + token * r->ref_strides[1] + column) * ref_size,
                    r->delta ? (char *)r->delta + (sample * r->delta_strides[0] + token * r->delta_strides[1] + column) * ref_size : 0,
                    r->codes + from * GROUP / 8 * bits, r->scale + 2 * from, r->delta ? r->beta[sample] : 0};
        while (from < last) {
            int64_t left = r->columns - column, many = minimum(minimum(last - from, left / GROUP), decode ? 1 : BATCH);
            if (many && decode) decode_group(r, at, bits, GROUP);
            else if (many) encode_groups(r, at, bits, (int)many, GROUP);
            else if (decode) decode_group(r, at, bits, (int)left);
            else encode_groups(r, at, bits, 1, (int)left);
            many += !many;
            from += many;
            column += many * GROUP;
            at.x += many * GROUP * x_size;
            at.ref += many * GROUP * ref_size;
            if (at.delta) at.delta += many * GROUP * ref_size;
            at.codes += many * GROUP / 8 * bits;
            at.scale += 2 * many;
        }
    }
}

typedef void Work(const Residual *, int64_t, int64_t);
#define WORK(name, bits, decode) \
    static void name(const Residual *r, int64_t from, int64_t end) { groups(r, from, end, bits, decode); }
WORK(encode8, 8, 0)
WORK(encode4, 4, 0)
WORK(encode2, 2, 0)
WORK(encode1, 1, 0)
WORK(decode8, 8, 1)
WORK(decode4, 4, 1)
WORK(decode2, 2, 1)
WORK(decode1, 1, 1)

/* In more parts than threads: others may be using a core. */
static void share_out(const Residual *r, Work *work) {
    int64_t total = r->samples * r->tokens * divide_up(r->columns, GROUP), parts = r->threads > 1 ? 4 * r->threads : 1;
#pragma omp parallel for num_threads(r->threads) schedule(dynamic, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) work(r, total * part / parts, total * (part + 1) / parts);
}

void dite_encode_residual(const Residual *r) { share_out(r, r->bits == 8 ? encode8 : r->bits == 4 ? encode4 : r->bits == 2 ? encode2 : encode1); }

void dite_decode_residual(const Residual *r) { share_out(r, r->bits == 8 ? decode8 : r->bits == 4 ? decode4 : r->bits == 2 ? decode2 : decode1); }
