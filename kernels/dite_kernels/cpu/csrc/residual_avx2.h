/* A group of 64 numbers in eight AVX2 registers. `count` is 64 in whole groups, and then known when this is compiled; others go through a buffer. */

#pragma once
#include "residual.h"

typedef struct { __m256 part[8]; } Values;

#define EACH _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)

INLINE Values zeros(void) {
    Values v;
    EACH v.part[i] = _mm256_setzero_ps();
    return v;
}

INLINE __m256 from_8_halves(const void *at, int type) {
    __m128i half = _mm_loadu_si128(at);
    return type == BFLOAT16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)) : _mm256_cvtph_ps(half);
}

/* `count` numbers, then zeros. */
INLINE Values load(const void *at, int type, int count) {
    Values v;
    float buffer[GROUP];
    if (count < GROUP) {
        memset(buffer, 0, sizeof buffer);
        memcpy(buffer, at, (size_t)(count * size_of(type)));
        at = buffer;
    }
    if (type == FLOAT32) EACH v.part[i] = _mm256_loadu_ps((const float *)at + 8 * i);
    else if (type == BFLOAT16) EACH v.part[i] = from_8_halves((const char *)at + 16 * i, BFLOAT16);
    else EACH v.part[i] = from_8_halves((const char *)at + 16 * i, FLOAT16);
    return v;
}

INLINE __m256i rounded_to_bf16(__m256 v) {
    __m256i wide = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(wide, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

/* Round to `type`, write `count` of them, and give back what was written. */
INLINE Values store(void *at, int type, const Values *v, int count) {
    Values held;
    float buffer[GROUP];
    char *to = count < GROUP ? (char *)buffer : at;
    EACH {
        __m256 value = v->part[i];
        held.part[i] = _mm256_blendv_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    }
    if (type == FLOAT32) EACH _mm256_storeu_ps((float *)to + 8 * i, held.part[i]);
    else EACH {
        __m128i half;
        if (type == BFLOAT16) {
            __m256i bits = rounded_to_bf16(held.part[i]);
            half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
            held.part[i] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
        } else {
            half = _mm256_cvtps_ph(held.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            held.part[i] = _mm256_cvtph_ps(half);
        }
        _mm_storeu_si128((__m128i *)(to + 16 * i), half);
    }
    if (count < GROUP) memcpy(at, buffer, (size_t)(count * size_of(type)));
    return held;
}

INLINE Values predicted(const Values *ref, const Values *delta, float beta) {
    Values v;
    EACH v.part[i] = _mm256_add_ps(ref->part[i], _mm256_mul_ps(_mm256_set1_ps(beta), delta->part[i]));
    return v;
}

INLINE Values difference(const Values *a, const Values *b) {
    Values v;
    EACH v.part[i] = _mm256_sub_ps(a->part[i], b->part[i]);
    return v;
}

INLINE __m256i size_bits(__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }

/* The bits of max |d|, which are ordered like the numbers; from 0x7f800000 on something is not finite. */
INLINE int32_t largest_bits(const Values *d) {
    __m256i all = _mm256_setzero_si256();
    EACH all = _mm256_max_epi32(all, size_bits(d->part[i]));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* Sum of round(|d| step), or of their squares. */
INLINE int32_t whole_sum(const Values *d, float step, int squares) {
    __m256i sum = _mm256_setzero_si256();
    EACH {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(size_bits(d->part[i])), _mm256_set1_ps(step)));
        sum = _mm256_add_epi32(sum, squares ? _mm256_madd_epi16(q, q) : q); /* the upper halves are zero */
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* Four registers of int32 to bytes, in order. */
INLINE __m256i bytes_of(const __m256i *q) {
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])); /* two lanes of four numbers of each */
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* 32 bytes of `bits` each, packed. */
INLINE void pack_bytes(uint8_t *to, __m256i codes, int bits) {
    __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(bits == 4 ? 0x1001 : 0x0401));
    if (bits == 2) pairs = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
    __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
    if (bits == 4) _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(low, high));
    else _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(_mm_packus_epi32(low, high), _mm_setzero_si128()));
}

INLINE __m256i at_least(__m256 d, float edge) { return _mm256_castps_si256(_mm256_cmp_ps(d, _mm256_set1_ps(edge), _CMP_GE_OQ)); }

INLINE void pack(uint8_t *to, const Values *d, float scale, int bits) {
    if (bits == 1) {
        EACH to[i] = (uint8_t)_mm256_movemask_ps(_mm256_castsi256_ps(at_least(d->part[i], 0)));
        return;
    }
    const int most = (1 << (bits - 1)) - 1;
    float inverse = scale > 0 ? 1 / scale : 0, edge = scale * THRESHOLD;
    __m256i q[8];
    EACH {
        if (bits == 2) {
            __m256i minus = _mm256_add_epi32(at_least(d->part[i], -edge), _mm256_add_epi32(at_least(d->part[i], 0), at_least(d->part[i], edge)));
            q[i] = _mm256_sub_epi32(_mm256_setzero_si256(), minus);
            continue;
        }
        __m256 value = _mm256_mul_ps(d->part[i], _mm256_set1_ps(inverse));
        q[i] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps((float)-most)), _mm256_set1_ps((float)most)));
    }
    for (int half = 0; half < 2; half++) {
        __m256i bytes = bytes_of(q + 4 * half);
        if (bits >= 4) bytes = _mm256_add_epi8(bytes, _mm256_set1_epi8((char)(most + 1)));
        if (bits == 8) _mm256_storeu_si256((__m256i *)(to + 32 * half), bytes);
        else pack_bytes(to + 4 * bits * half, bytes, bits);
    }
}

/* from + D(codes) */
INLINE Values sum_with_codes(const Values *from, const uint8_t *codes, float scale, int bits) {
    Values v;
    __m256 s = _mm256_set1_ps(scale), minus = _mm256_set1_ps(-scale);
    __m256 levels = _mm256_mul_ps(_mm256_setr_ps(-HIGH_LEVEL, -LOW_LEVEL, LOW_LEVEL, HIGH_LEVEL, -HIGH_LEVEL, -LOW_LEVEL, LOW_LEVEL, HIGH_LEVEL), s);
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    EACH {
        __m256 change;
        uint32_t word = 0;
        if (bits < 8) memcpy(&word, codes + bits * i, (size_t)bits);
        __m256i all = _mm256_set1_epi32((int32_t)word);
        if (bits == 8) {
            __m128i bytes = _mm_xor_si128(_mm_loadl_epi64((const __m128i *)(codes + 8 * i)), _mm_set1_epi8((char)0x80));
            change = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), s);
        } else if (bits == 4) {
            __m256i code = _mm256_and_si256(_mm256_srlv_epi32(all, _mm256_slli_epi32(order, 2)), _mm256_set1_epi32(15));
            change = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(8))), s);
        } else if (bits == 2) change = _mm256_permutevar8x32_ps(levels, _mm256_srlv_epi32(all, _mm256_slli_epi32(order, 1)));
        else {
            __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), order);
            change = _mm256_blendv_ps(minus, s, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit)));
        }
        v.part[i] = _mm256_add_ps(from->part[i], change);
    }
    return v;
}
