// Sixteen fp32 lanes on AVX-512 (F, BW, DQ, VL, VBMI) with GFNI: Ice Lake, Zen 4 and later.
// Included once, by isa_avx512.cpp.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "cpu/kernels.h"

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
CONDU_INLINE Lanes without_negative_zero(Lanes a) {
  return {_mm512_add_ps(a.v, _mm512_setzero_ps())};
}
// a ^ (~sign & signbit). By hand: gcc 12 moves values between its float and integer vectors through
// memory.
CONDU_INLINE Lanes negate_unless(Lanes a, Lanes sign) {
  asm("vpternlogd $0xd2, %2, %1, %0" : "+v"(a.v) : "v"(sign.v), "v"(_mm512_set1_epi32(1 << 31)));
  return a;
}

CONDU_INLINE Mask above_zero(Lanes a) {
  return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ)};
}
CONDU_INLINE Mask below_zero(Lanes a) {
  return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ)};
}
CONDU_INLINE Mask either(Mask a, Mask b) { return {_kor_mask16(a.m, b.m)}; }
// By hand: gcc 12 loads a mask through a general register. (Yk: not k0, which cannot mask.)
CONDU_INLINE Mask load_mask(const uint8_t* p) {
  Mask r;
  asm("kmovw %1, %0" : "=Yk"(r.m) : "m"(*(const uint16_t __attribute__((may_alias))*)p));
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

// Mask bits of eight planes, so turned that one vector holds them for 64 elements.
struct Turned {
  __m512i step[kSteps];  // 64-bit lane t: plane t
};
CONDU_INLINE Turned turn_lines(const uint8_t* lines) {
  __m512i a[8], b[8];
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) a[t] = _mm512_load_si512(lines + t * kLine);
#pragma GCC unroll 8
  for (int t = 0; t < 8; t += 2) {
    b[t] = _mm512_unpacklo_epi64(a[t], a[t + 1]);
    b[t + 1] = _mm512_unpackhi_epi64(a[t], a[t + 1]);
  }
#pragma GCC unroll 8
  for (int h = 0; h < 2; ++h) {  // even and odd qwords
    const __m512i p = _mm512_shuffle_i64x2(b[h], b[2 + h], 0x88);
    const __m512i q = _mm512_shuffle_i64x2(b[h], b[2 + h], 0xdd);
    const __m512i r = _mm512_shuffle_i64x2(b[4 + h], b[6 + h], 0x88);
    const __m512i s = _mm512_shuffle_i64x2(b[4 + h], b[6 + h], 0xdd);
    a[h] = _mm512_shuffle_i64x2(p, r, 0x88);
    a[2 + h] = _mm512_shuffle_i64x2(q, s, 0x88);
    a[4 + h] = _mm512_shuffle_i64x2(p, r, 0xdd);
    a[6 + h] = _mm512_shuffle_i64x2(q, s, 0xdd);
  }
  Turned r;
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) r.step[s] = a[s];
  return r;
}

// For each of a step's elements the bits of eight tasks. Byte 4 l + v belongs to lane l of vector
// v, so that a shift brings any vector's bits to the bottom of the 32-bit lanes.
struct Pattern {
  __m512i v;
};
CONDU_INLINE Pattern load_pattern(const Turned* turned, int s) {
  // Bytes of each group of eight elements, last task first: a bit matrix as GF2P8AFFINEQB reads it,
  // which multiplied by the unit vectors is its transpose.
  alignas(64) static constexpr uint8_t kByGroup[64] = {
      56, 48, 40, 32, 24, 16, 8,  0,  57, 49, 41, 33, 25, 17, 9,  1,  58, 50, 42, 34, 26, 18,
      10, 2,  59, 51, 43, 35, 27, 19, 11, 3,  60, 52, 44, 36, 28, 20, 12, 4,  61, 53, 45, 37,
      29, 21, 13, 5,  62, 54, 46, 38, 30, 22, 14, 6,  63, 55, 47, 39, 31, 23, 15, 7};
  alignas(64) static constexpr uint8_t kByLane[64] = {
      0,  16, 32, 48, 1,  17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21,
      37, 53, 6,  22, 38, 54, 7,  23, 39, 55, 8,  24, 40, 56, 9,  25, 41, 57, 10, 26, 42, 58,
      11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
  const __m512i matrix = _mm512_permutexvar_epi8(_mm512_load_si512(kByGroup), turned->step[s]);
  const __m512i units = _mm512_set1_epi64((int64_t)0x8040201008040201);
  const __m512i bits = _mm512_gf2p8affine_epi64_epi8(units, matrix, 0);
  return {_mm512_permutexvar_epi8(_mm512_load_si512(kByLane), bits)};
}
CONDU_INLINE int place_of_sum(int bits) { return bits; }
CONDU_INLINE int place_of_maximum(int bits) { return 16 + bits; }
// A group's entries for the lanes of vector v: the first four tasks' (half 0) or the others'.
CONDU_INLINE void look_up(const float* tables, Pattern p, int v, int half, Lanes* sum,
                          Lanes* largest) {
  const __m512i i =
      _mm512_srli_epi32(p.v, (unsigned)(8 * v + 4 * half));  // the low four bits count
  *sum = {_mm512_permutexvar_ps(i, _mm512_load_ps(tables))};
  *largest = {_mm512_permutexvar_ps(i, _mm512_load_ps(tables + 16))};
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
  const __m512i bits = _mm512_loadu_si512(line);
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
