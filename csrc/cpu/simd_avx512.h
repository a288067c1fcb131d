// Sixteen fp32 lanes on AVX-512 (F, BW, DQ, VL). Included once, by isa_avx512.cpp.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define CONDU_INLINE static inline __attribute__((always_inline))

namespace condu {
namespace {

struct Lanes {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};
struct Index {
  __m512i v;  // the low four bits of each 32-bit lane
};

CONDU_INLINE Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
CONDU_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
CONDU_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
CONDU_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
CONDU_INLINE Lanes max_of(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
CONDU_INLINE Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.v)}; }
CONDU_INLINE Lanes without_negative_zero(Lanes a) {
  return {_mm512_add_ps(a.v, _mm512_setzero_ps())};
}
// a ^ (~sign & signbit)
CONDU_INLINE Lanes negate_unless(Lanes a, Lanes sign) {
  const __m512i bits = _mm512_ternarylogic_epi32(
      _mm512_castps_si512(a.v), _mm512_castps_si512(sign.v), _mm512_set1_epi32(1 << 31), 0xd2);
  return {_mm512_castsi512_ps(bits)};
}

CONDU_INLINE Mask above_zero(Lanes a) {
  return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ)};
}
CONDU_INLINE Mask below_zero(Lanes a) {
  return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ)};
}
CONDU_INLINE Mask either(Mask a, Mask b) { return {_kor_mask16(a.m, b.m)}; }
// By hand: gcc 12 loads a mask through a general register.
CONDU_INLINE Mask load_mask(const uint8_t* p) {
  Mask r;
  asm("kmovw %1, %0" : "=k"(r.m) : "m"(*(const uint16_t __attribute__((may_alias))*)p));
  return r;
}
CONDU_INLINE void store_mask(uint8_t* p, Mask a) {
  asm("kmovw %1, %0" : "=m"(*(uint16_t __attribute__((may_alias))*)p) : "k"(a.m));
}

CONDU_INLINE Lanes keep(Mask m, Lanes a) { return {_mm512_maskz_mov_ps(m.m, a.v)}; }
CONDU_INLINE Lanes choose(Mask m, Lanes yes, Lanes no) {
  return {_mm512_mask_mov_ps(no.v, m.m, yes.v)};
}
CONDU_INLINE Lanes add_where(Lanes sum, Mask m, Lanes a) {
  return {_mm512_mask_add_ps(sum.v, m.m, sum.v, a.v)};
}

// Byte e of `pattern` gets bit e of each of up to eight planes: plane t gives bit t.
CONDU_INLINE void transpose_bits(const uint8_t* const* planes, int count, int64_t byte,
                                 uint8_t* pattern) {
  __m512i all = _mm512_setzero_si512(), bit = _mm512_set1_epi8(1);
  for (int t = 0; t < count; ++t) {
    __mmask64 set;
    asm("kmovq %1, %0"
        : "=k"(set)
        : "m"(*(const uint64_t __attribute__((may_alias))*)(planes[t] + byte)));
    all = _mm512_mask_add_epi8(all, set, all, bit);  // bits are distinct: a sum is an or
    bit = _mm512_add_epi8(bit, bit);
  }
  _mm512_store_si512(pattern, all);
}
CONDU_INLINE Index load_index(const uint8_t* pattern) {
  return {_mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)pattern))};
}
CONDU_INLINE Index next_four(Index i) { return {_mm512_srli_epi32(i.v, 4)}; }
CONDU_INLINE Lanes lookup(const float* table, Index i) {
  return {_mm512_permutexvar_ps(i.v, _mm512_load_ps(table))};
}

CONDU_INLINE Lanes load_f32(const float* p) { return {_mm512_loadu_ps(p)}; }
CONDU_INLINE void store_f32(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
CONDU_INLINE void stream_f32(float* p, Lanes a) { _mm512_stream_ps(p, a.v); }
CONDU_INLINE Lanes load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256((const __m256i*)p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// To nearest, ties to even; by hand, since the bf16 instructions flush subnormals.
CONDU_INLINE __m256i to_bf16(Lanes a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, x, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
CONDU_INLINE void store_bf16(uint16_t* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
CONDU_INLINE void stream_bf16(uint16_t* p, Lanes a) {
  _mm256_stream_si256((__m256i*)p, to_bf16(a));
}
CONDU_INLINE Lanes load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
CONDU_INLINE void store_f16(uint16_t* p, Lanes a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
CONDU_INLINE void stream_f16(uint16_t* p, Lanes a) {
  _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// Cache lines of mask bits.
CONDU_INLINE void store_line(uint8_t* p, const uint8_t* line, bool past_cache) {
  const __m512i bits = _mm512_load_si512(line);
  past_cache ? _mm512_stream_si512((__m512i*)p, bits) : _mm512_storeu_si512(p, bits);
}
CONDU_INLINE void store_common(uint8_t* p, const uint8_t* a, const uint8_t* line, bool past_cache) {
  const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(a), _mm512_load_si512(line));
  past_cache ? _mm512_stream_si512((__m512i*)p, bits) : _mm512_storeu_si512(p, bits);
}

// sums[l] += lane l, in fp64.
CONDU_INLINE void add_to_double(double* sums, Lanes a) {
  const __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
  _mm512_store_pd(sums, _mm512_add_pd(_mm512_load_pd(sums), _mm512_cvtps_pd(low)));
  _mm512_store_pd(sums + 8, _mm512_add_pd(_mm512_load_pd(sums + 8), _mm512_cvtps_pd(high)));
}

}  // namespace
}  // namespace condu
