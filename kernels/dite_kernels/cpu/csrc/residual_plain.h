/* A group of 64 numbers in memory, and loops that compilers vectorise for whatever processor there is. `count` is 64 in whole groups, and then known
   when this is compiled. */

#pragma once
#include "residual.h"

typedef struct { float part[GROUP]; } Values;

#define EACH for (int k = 0; k < GROUP; k++)

static const float NO_FRACTION = 12582912; /* adding 1.5 * 2^23 rounds to a whole number, half to even, which is then in the low bits */

INLINE Values zeros(void) { return (Values){{0}}; }

/* `count` numbers, then zeros. */
INLINE Values load(const void *at, int type, int count) {
    Values v;
    uint16_t half[GROUP] = {0};
    if (type == FLOAT32) {
        if (count < GROUP) v = zeros();
        memcpy(v.part, at, 4 * (size_t)count);
        return v;
    }
    memcpy(half, at, 2 * (size_t)count);
    if (type == BFLOAT16) EACH v.part[k] = from_bf16(half[k]);
    else EACH v.part[k] = from_half(half[k]);
    return v;
}

/* Round to `type`, write `count` of them, and give back what was written. */
INLINE Values store(void *at, int type, const Values *v, int count) {
    Values held;
    uint16_t half[GROUP];
    EACH held.part[k] = v->part[k] == v->part[k] ? v->part[k] : float_of(0x7fc00000);
    if (type == FLOAT32) {
        memcpy(at, held.part, 4 * (size_t)count);
        return held;
    }
    if (type == BFLOAT16) EACH {
        uint32_t bits = bits_of(held.part[k]);
        half[k] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    else EACH half[k] = to_half(held.part[k]);
    if (type == BFLOAT16) EACH held.part[k] = from_bf16(half[k]);
    else EACH held.part[k] = from_half(half[k]);
    memcpy(at, half, 2 * (size_t)count);
    return held;
}

INLINE Values predicted(const Values *ref, const Values *delta, float beta) {
    Values v;
    EACH v.part[k] = ref->part[k] + beta * delta->part[k];
    return v;
}

INLINE Values difference(const Values *a, const Values *b) {
    Values v;
    EACH v.part[k] = a->part[k] - b->part[k];
    return v;
}

/* The bits of max |d|, which are ordered like the numbers; from 0x7f800000 on something is not finite. */
INLINE int32_t largest_bits(const Values *d) {
    int32_t largest = 0;
    EACH {
        int32_t size = (int32_t)(bits_of(d->part[k]) & 0x7fffffff);
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* Sum of round(|d| step), or of their squares. */
INLINE int32_t whole_sum(const Values *d, float step, int squares) {
    int32_t sum = 0;
    EACH {
        int32_t q = (int32_t)(bits_of(float_of(bits_of(d->part[k]) & 0x7fffffff) * step + NO_FRACTION) - bits_of(NO_FRACTION));
        sum += squares ? (int16_t)q * (int16_t)q : q; /* a product of 16 bits is one instruction */
    }
    return sum;
}

INLINE void pack(uint8_t *to, const Values *d, float scale, int bits) {
    uint8_t codes[GROUP];
    if (bits == 1) EACH codes[k] = d->part[k] >= 0;
    else if (bits == 2) {
        float edge = scale * THRESHOLD;
        EACH codes[k] = (uint8_t)((d->part[k] >= -edge) + (d->part[k] >= 0) + (d->part[k] >= edge));
    } else {
        const int most = (1 << (bits - 1)) - 1;
        float inverse = scale > 0 ? 1 / scale : 0;
        EACH {
            float value = d->part[k] * inverse;
            value = value > (float)-most ? value : (float)-most;
            value = value < (float)most ? value : (float)most;
            codes[k] = (uint8_t)(bits_of(value + NO_FRACTION) + (uint32_t)(most + 1)); /* NO_FRACTION's own low bits are zero */
        }
    }
    const int each = 8 / bits;
    for (int i = 0; i < GROUP / each; i++) {
        unsigned byte = 0;
        for (int k = 0; k < each; k++) byte |= (unsigned)codes[i * each + k] << k * bits;
        to[i] = (uint8_t)byte;
    }
}

INLINE Values sum_with_codes(const Values *from, const uint8_t *packed, float scale, int bits) {
    Values v;
    uint8_t codes[GROUP];
    const int each = 8 / bits;
    for (int i = 0; i < GROUP / each; i++)
        for (int k = 0; k < each; k++) codes[i * each + k] = packed[i] >> k * bits & ((1 << bits) - 1);
    EACH {
        float level;
        if (bits == 1) level = codes[k] ? 1.0f : -1.0f;
        else if (bits == 2) {
            float size = codes[k] == 0 || codes[k] == 3 ? HIGH_LEVEL : LOW_LEVEL;
            level = codes[k] >= 2 ? size : -size;
        } else level = (float)((int)codes[k] - (1 << (bits - 1)));
        v.part[k] = from->part[k] + level * scale;
    }
    return v;
}
