// Sixteen fp32 lanes on AVX2 and F16C. Included once, by isa_avx2.cpp.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define CONDU_INLINE static inline __attribute__((always_inline))

namespace condu {
namespace {

struct Lanes {
  __m256 lo, hi;
};
struct Mask {
  __m256 lo, hi;  // all ones or all zeros in each lane
};

CONDU_INLINE Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
CONDU_INLINE Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
CONDU_INLINE Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
CONDU_INLINE Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
CONDU_INLINE Lanes max_of(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
CONDU_INLINE Lanes magnitude(Lanes a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}

CONDU_INLINE Mask above_zero(Lanes a) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_cmp_ps(a.lo, zero, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, zero, _CMP_GT_OQ)};
}
CONDU_INLINE Mask below_zero(Lanes a) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_cmp_ps(a.lo, zero, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, zero, _CMP_LT_OQ)};
}
CONDU_INLINE Mask either(Mask a, Mask b) {
  return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)};
}
CONDU_INLINE Mask both(Mask a, Mask b) {
  return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)};
}
CONDU_INLINE Mask complement(Mask a) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(a.lo, ones), _mm256_xor_ps(a.hi, ones)};
}
CONDU_INLINE __m256 spread(__m256i bits, __m256i weights) {
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, weights), weights));
}
CONDU_INLINE Mask mask_of(uint16_t bits) {
  const __m256i all = _mm256_set1_epi32(bits);
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {spread(all, low), spread(all, _mm256_slli_epi32(low, 8))};
}
CONDU_INLINE uint16_t bits_of(Mask a) {
  return (uint16_t)(_mm256_movemask_ps(a.lo) | (_mm256_movemask_ps(a.hi) << 8));
}

CONDU_INLINE Lanes keep(Mask m, Lanes a) {
  return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)};
}
CONDU_INLINE Lanes choose(Mask m, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
CONDU_INLINE Lanes sign_where(Mask m) { return keep(m, splat(-0.0f)); }
CONDU_INLINE Lanes flip(Lanes a, Lanes sign) {
  return {_mm256_xor_ps(a.lo, sign.lo), _mm256_xor_ps(a.hi, sign.hi)};
}
// Sums start at +0 and their terms are never -0, so adding +0 is the same as not adding.
CONDU_INLINE Lanes add_where(Lanes sum, Mask m, Lanes a) { return sum + keep(m, a); }
// For maxima that start at +0, of values that are not negative.
CONDU_INLINE Lanes max_where(Lanes largest, Mask m, Lanes a) { return max_of(keep(m, a), largest); }

CONDU_INLINE Lanes load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
CONDU_INLINE void store_f32(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
CONDU_INLINE __m256 widen_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
CONDU_INLINE Lanes load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
// To nearest, ties to even; the result is in the low half of each 32-bit lane.
CONDU_INLINE __m256i round_to_bf16(__m256 a) {
  const __m256i x = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
CONDU_INLINE void store_bf16(uint16_t* p, Lanes a) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(a.lo), round_to_bf16(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
CONDU_INLINE Lanes load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
CONDU_INLINE void store_f16(uint16_t* p, Lanes a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

CONDU_INLINE void add_quarter(double* sums, __m128 a) {
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(a)));
}
// sums[l] += lane l, in fp64.
CONDU_INLINE void add_to_double(double* sums, Lanes a) {
  add_quarter(sums, _mm256_castps256_ps128(a.lo));
  add_quarter(sums + 4, _mm256_extractf128_ps(a.lo, 1));
  add_quarter(sums + 8, _mm256_castps256_ps128(a.hi));
  add_quarter(sums + 12, _mm256_extractf128_ps(a.hi, 1));
}

}  // namespace
}  // namespace condu
