/* What the residual codecs are given, and numbers of 16 bits. */

#pragma once
#include "types.h"

enum { GROUP = 64, FLOAT16 = 2 };

static const float LOW_LEVEL = 0.453125f, HIGH_LEVEL = 1.5078125f, THRESHOLD = 0.98046875f; /* of int2 */

/* Tensors [samples, tokens, columns], each with strides of its own in samples and tokens, in elements. `delta` (of ref's type) and `beta` [samples]
   are null without a prediction. Codes and scales lie in one piece, at any address. */
typedef struct {
    const void *x; /* null to decode */
    void *ref, *delta;
    const float *beta;
    uint8_t *codes, *scale;
    int64_t samples, tokens, columns;
    int64_t x_strides[2], ref_strides[2], delta_strides[2];
    int32_t x_type, ref_type, bits, threads;
} Residual;

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

INLINE uint32_t bits_of(float x) {
    union { float f; uint32_t i; } value = {x};
    return value.i;
}

INLINE float float_of(uint32_t bits) {
    union { uint32_t i; float f; } value = {bits};
    return value.f;
}

#ifdef __F16C__

INLINE float from_half(uint16_t half) { return _cvtsh_ss(half); }

INLINE uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#else

/* fp16 to fp32, subnormals too: the exponent is moved by a multiplication. NaN stays NaN. */
INLINE float from_half(uint16_t half) {
    uint32_t size = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t bits = size < 0x7c00 ? bits_of(float_of(size << 13) * 0x1p112f) : size << 13 | 0x7f800000;
    return float_of(bits | sign);
}

/* The nearest fp16 number, half to even: adding a power of two of the right size rounds the fraction where fp16's ends. */
INLINE uint16_t to_half(float x) {
    uint32_t bits = bits_of(x), doubled = bits + bits, bias = doubled & 0xff000000;
    float size = float_of(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f; /* what is too large becomes infinite */
    bias = bias < 0x71000000 ? 0x71000000 : bias;
    uint32_t rounded = bits_of(float_of((bias >> 1) + 0x07800000) + size);
    uint32_t half = (rounded >> 13 & 0x7c00) + (rounded & 0x0fff);
    return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)(doubled > 0xff000000 ? 0x7e00 : half);
}

#endif
