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

CONDU_INLINE Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
CONDU_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
CONDU_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
CONDU_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
CONDU_INLINE Lanes max_of(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
CONDU_INLINE Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.v)}; }

CONDU_INLINE Mask above_zero(Lanes a) {
  return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ)};
}
CONDU_INLINE Mask below_zero(Lanes a) {
  return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ)};
}
CONDU_INLINE Mask either(Mask a, Mask b) { return {_kor_mask16(a.m, b.m)}; }
CONDU_INLINE Mask both(Mask a, Mask b) { return {_kand_mask16(a.m, b.m)}; }
CONDU_INLINE Mask complement(Mask a) { return {_knot_mask16(a.m)}; }
CONDU_INLINE Mask mask_of(uint16_t bits) { return {_cvtu32_mask16(bits)}; }
CONDU_INLINE uint16_t bits_of(Mask a) { return (uint16_t)_cvtmask16_u32(a.m); }

CONDU_INLINE Lanes keep(Mask m, Lanes a) { return {_mm512_maskz_mov_ps(m.m, a.v)}; }
CONDU_INLINE Lanes choose(Mask m, Lanes yes, Lanes no) {
  return {_mm512_mask_mov_ps(no.v, m.m, yes.v)};
}
CONDU_INLINE Lanes sign_where(Mask m) { return {_mm512_maskz_mov_ps(m.m, _mm512_set1_ps(-0.0f))}; }
CONDU_INLINE Lanes flip(Lanes a, Lanes sign) { return {_mm512_xor_ps(a.v, sign.v)}; }
CONDU_INLINE Lanes add_where(Lanes sum, Mask m, Lanes a) {
  return {_mm512_mask_add_ps(sum.v, m.m, sum.v, a.v)};
}
CONDU_INLINE Lanes max_where(Lanes largest, Mask m, Lanes a) {
  return {_mm512_mask_max_ps(largest.v, m.m, largest.v, a.v)};
}

CONDU_INLINE Lanes load_f32(const float* p) { return {_mm512_loadu_ps(p)}; }
CONDU_INLINE void store_f32(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
CONDU_INLINE Lanes load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256((const __m256i*)p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// To nearest, ties to even; by hand, since the bf16 instructions flush subnormals.
CONDU_INLINE void store_bf16(uint16_t* p, Lanes a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, x, _mm512_set1_epi32(0x00400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
CONDU_INLINE Lanes load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
CONDU_INLINE void store_f16(uint16_t* p, Lanes a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// sums[l] += lane l, in fp64.
CONDU_INLINE void add_to_double(double* sums, Lanes a) {
  const __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(high)));
}

}  // namespace
}  // namespace condu
