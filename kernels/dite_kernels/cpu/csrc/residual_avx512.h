/* A group of 64 numbers in four AVX512 registers. `count` is 64 in whole groups, and then known when this is compiled. */

#pragma once
#include "residual.h"

typedef struct { __m512 part[4]; } Values;

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)

INLINE __mmask16 present(int count, int i) { return count >= 16 * i + 16 ? 0xffff : count > 16 * i ? (__mmask16)((1u << (count - 16 * i)) - 1) : 0; }

INLINE Values zeros(void) {
    Values v;
    EACH v.part[i] = _mm512_setzero_ps();
    return v;
}

INLINE __m512 wide_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

/* `count` numbers, then zeros. */
INLINE Values load(const void *at, int type, int count) {
    Values v;
    if (type == FLOAT32) EACH v.part[i] = _mm512_maskz_loadu_ps(present(count, i), (const float *)at + 16 * i);
    else if (type == BFLOAT16) EACH v.part[i] = wide_bf16(_mm256_maskz_loadu_epi16(present(count, i), (const uint16_t *)at + 16 * i));
    else EACH v.part[i] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(present(count, i), (const uint16_t *)at + 16 * i));
    return v;
}

INLINE __m256i narrow_bf16(__m512 v) {
    __m512i wide = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    /* No vcvtneps2bf16: it takes subnormals for zeros. */
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
}

/* Round to `type`, write `count` of them, and give back what was written. */
INLINE Values store(void *at, int type, const Values *v, int count) {
    Values held;
    EACH {
        __m512 value = v->part[i];
        value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
        if (type == FLOAT32) {
            held.part[i] = value;
            _mm512_mask_storeu_ps((float *)at + 16 * i, present(count, i), value);
            continue;
        }
        __m256i half = type == BFLOAT16 ? narrow_bf16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        held.part[i] = type == BFLOAT16 ? wide_bf16(half) : _mm512_cvtph_ps(half);
        _mm256_mask_storeu_epi16((uint16_t *)at + 16 * i, present(count, i), half);
    }
    return held;
}

INLINE Values predicted(const Values *ref, const Values *delta, float beta) {
    Values v;
    EACH v.part[i] = _mm512_add_ps(ref->part[i], _mm512_mul_ps(_mm512_set1_ps(beta), delta->part[i]));
    return v;
}

INLINE Values difference(const Values *a, const Values *b) {
    Values v;
    EACH v.part[i] = _mm512_sub_ps(a->part[i], b->part[i]);
    return v;
}

INLINE __m512i size_bits(__m512 v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }

/* The bits of max |d|, which are ordered like the numbers; from 0x7f800000 on something is not finite. */
INLINE int32_t largest_bits(const Values *d) {
    __m512i a = _mm512_max_epi32(size_bits(d->part[0]), size_bits(d->part[1])), b = _mm512_max_epi32(size_bits(d->part[2]), size_bits(d->part[3]));
    return _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
}

/* Sum of round(|d| step), or of their squares. */
INLINE int32_t whole_sum(const Values *d, float step, int squares) {
    __m512i sum = _mm512_setzero_si512();
    EACH {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(size_bits(d->part[i])), _mm512_set1_ps(step)));
        sum = _mm512_add_epi32(sum, squares ? _mm512_madd_epi16(q, q) : q); /* the upper halves are zero */
    }
    return _mm512_reduce_add_epi32(sum);
}

/* 64 bytes of `bits` each, packed. */
INLINE void pack_bytes(uint8_t *to, __m512i codes, int bits) {
    __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(bits == 4 ? 0x1001 : 0x0401));
    if (bits == 4) _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi16_epi8(pairs));
    else _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001))));
}

INLINE __mmask64 at_least(const Values *d, float edge) {
    __mmask64 mask = 0;
    EACH mask |= (__mmask64)_mm512_cmp_ps_mask(d->part[i], _mm512_set1_ps(edge), _CMP_GE_OQ) << 16 * i;
    return mask;
}

INLINE void pack(uint8_t *to, const Values *d, float scale, int bits) {
    if (bits == 1) {
        uint64_t codes = at_least(d, 0);
        memcpy(to, &codes, 8);
        return;
    }
    if (bits == 2) { /* the three thresholds follow each other, so that the low bit is that of their count */
        float edge = scale * THRESHOLD;
        __mmask64 zero = at_least(d, 0), low = at_least(d, -edge) ^ zero ^ at_least(d, edge);
        pack_bytes(to, _mm512_or_si512(_mm512_maskz_set1_epi8(zero, 2), _mm512_maskz_set1_epi8(low, 1)), 2);
        return;
    }
    int most = (1 << (bits - 1)) - 1;
    __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    __m512i q[4];
    EACH {
        __m512 value = _mm512_mul_ps(d->part[i], inverse);
        q[i] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps((float)-most)), _mm512_set1_ps((float)most)));
    }
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3])); /* four lanes of four numbers of each */
    bytes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
    bytes = _mm512_add_epi8(bytes, _mm512_set1_epi8((char)(most + 1)));
    if (bits == 8) _mm512_storeu_si512(to, bytes);
    else pack_bytes(to, bytes, 4);
}

/* from + D(codes): the products are exact, so that a fused multiply-add rounds as often as a product and a sum. */
INLINE Values sum_with_codes(const Values *from, const uint8_t *codes, float scale, int bits) {
    Values v;
    __m512 s = _mm512_set1_ps(scale), minus = _mm512_set1_ps(-scale);
    __m512 two = _mm512_mul_ps(_mm512_broadcast_f32x4(_mm_setr_ps(-HIGH_LEVEL, -LOW_LEVEL, LOW_LEVEL, HIGH_LEVEL)), s);
    __m512 four = _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), s);
    uint64_t signs;
    memcpy(&signs, codes, 8);
    EACH {
        __m512 change;
        if (bits == 8) {
            __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(codes + 16 * i)), _mm_set1_epi8((char)0x80));
            v.part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), s, from->part[i]);
            continue;
        }
        if (bits == 4) { /* a byte in every 64 bits, and again with its upper half at bit 32; the table reads 4 bits of an index */
            __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + 8 * i)));
            change = _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), four);
        } else if (bits == 2) { /* the table repeats every 4 */
            int32_t word;
            memcpy(&word, codes + 4 * i, 4);
            const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            change = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), two);
        } else change = _mm512_mask_mov_ps(minus, (__mmask16)(signs >> 16 * i), s);
        v.part[i] = _mm512_add_ps(from->part[i], change);
    }
    return v;
}
