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
static const uint16_t HALF_NAN = 0x7e00;

/* The fp16 scale of a group of finite numbers d. */
INLINE uint16_t scale_of(const Values *d, float largest, int count, int bits) {
    if (bits >= 4) {
        float scale = largest / (float)((1 << (bits - 1)) - 1);
        scale = scale < HALF_MAX ? scale : HALF_MAX;
        uint16_t half = to_half(scale);
        return half + (from_half(half) < scale); /* bits of positive halves are ordered like the numbers; no branch, half of them would be missed */
    }
    float step = (bits == 2 ? 0x1p12f : 0x1p15f) / (largest > SMALLEST ? largest : SMALLEST);
    float sum = (float)whole_sum(d, step, bits == 2), scale = bits == 2 ? sqrtf(sum / (float)count) / step : sum / (step * (float)count);
    return to_half(scale < HALF_MAX ? scale : HALF_MAX);
}

/* A group's places: of its first element in each tensor, of its codes and its scale. */
typedef struct {
    const char *x;
    char *ref, *delta;
    uint8_t *codes, *scale;
    float beta;
} Group;

/* What the group is compared with and added to; `ref` is what is there now. */
INLINE Values prediction(const Residual *r, const Group *at, const Values *ref, const Values *delta) {
    return r->delta ? predicted(ref, delta, at->beta) : *ref;
}

/* Beyond `count` everything is zero, and so is d; but for a beta that is not finite, and poisons the group as it is. */
INLINE void encode_group(const Residual *r, Group at, int bits, int count) {
    Values ref = load(at.ref, r->ref_type, count), delta;
    if (r->delta) delta = load(at.delta, r->ref_type, count);
    Values x = load(at.x, r->x_type, count), from = prediction(r, &at, &ref, &delta), d = difference(&x, &from);
    int32_t largest = largest_bits(&d);
    int finite = largest < 0x7f800000;
    if (!finite) {
        d = zeros();
        largest = 0;
    }
    uint16_t scale = scale_of(&d, float_of((uint32_t)largest), count, bits);
    pack(at.codes, &d, from_half(scale), bits);
    if (!finite) scale = HALF_NAN;
    memcpy(at.scale, &scale, 2);
}

/* NaN is written as one pattern of bits, whichever operand it came from: ranks compare their references by hash. */
INLINE void decode_group(const Residual *r, Group at, int bits, int count) {
    uint16_t half;
    memcpy(&half, at.scale, 2);
    Values ref = load(at.ref, r->ref_type, count), delta;
    if (r->delta) delta = load(at.delta, r->ref_type, count);
    Values from = prediction(r, &at, &ref, &delta), new = sum_with_codes(&from, at.codes, from_half(half), bits);
    Values held = store(at.ref, r->ref_type, &new, count);
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
        for (; from < last; from++, column += GROUP) {
            int count = (int)minimum(GROUP, r->columns - column);
            if (count < GROUP) decode ? decode_group(r, at, bits, count) : encode_group(r, at, bits, count);
            else decode ? decode_group(r, at, bits, GROUP) : encode_group(r, at, bits, GROUP);
            at.x += GROUP * x_size;
            at.ref += GROUP * ref_size;
            if (at.delta) at.delta += GROUP * ref_size;
            at.codes += GROUP / 8 * bits;
            at.scale += 2;
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

static void share_out(const Residual *r, Work *work) {
    int64_t total = r->samples * r->tokens * divide_up(r->columns, GROUP), parts = r->threads;
#pragma omp parallel for num_threads(r->threads) schedule(static) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) work(r, total * part / parts, total * (part + 1) / parts);
}

void dite_encode_residual(const Residual *r) { share_out(r, r->bits == 8 ? encode8 : r->bits == 4 ? encode4 : r->bits == 2 ? encode2 : encode1); }

void dite_decode_residual(const Residual *r) { share_out(r, r->bits == 8 ? decode8 : r->bits == 4 ? decode4 : r->bits == 2 ? decode2 : decode1); }
