// Sixteen fp32 lanes on AVX2 and F16C. Included once, by isa_avx2.cpp.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "cpu/kernels.h"

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
CONDU_INLINE Lanes without_negative_zero(Lanes a) { return a + splat(0.0f); }
CONDU_INLINE Lanes negate_unless(Lanes a, Lanes sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, _mm256_andnot_ps(sign.lo, bit)),
          _mm256_xor_ps(a.hi, _mm256_andnot_ps(sign.hi, bit))};
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

// The lanes of each byte of mask bits: spreading bits costs more instructions than this load.
struct SpreadBits {
  alignas(32) uint32_t lanes[256][8];
};
constexpr SpreadBits spread_bits() {
  SpreadBits table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int l = 0; l < 8; ++l) table.lanes[byte][l] = byte >> l & 1 ? 0xffffffffu : 0;
  }
  return table;
}
constexpr SpreadBits kSpreadBits = spread_bits();

CONDU_INLINE Mask load_mask(const uint8_t* p) {
  return {_mm256_load_ps((const float*)kSpreadBits.lanes[p[0]]),
          _mm256_load_ps((const float*)kSpreadBits.lanes[p[1]])};
}
CONDU_INLINE void store_mask(uint8_t* p, Mask a) {
  p[0] = (uint8_t)_mm256_movemask_ps(a.lo);
  p[1] = (uint8_t)_mm256_movemask_ps(a.hi);
}

CONDU_INLINE Lanes keep(Mask m, Lanes a) {
  return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)};
}
CONDU_INLINE Lanes choose(Mask m, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
// Sums start at +0 and their terms are never -0, so adding +0 is the same as not adding.
CONDU_INLINE Lanes add_where(Lanes sum, Mask m, Lanes a) { return sum + keep(m, a); }

// Mask bits of eight planes, so turned that one vector holds them for 32 elements.
struct Turned {
  __m256i half[2 * kSteps];  // 32-bit lane t: plane t
};
CONDU_INLINE __m256i interleave(__m256i a, __m256i b, bool high) {
  return high ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
}
CONDU_INLINE Turned turn_lines(const uint8_t* lines) {
  Turned r;
  for (int part = 0; part < 2; ++part) {  // of a line
    __m256i a[8], b[8];
    for (int t = 0; t < 8; ++t) {
      a[t] = _mm256_load_si256((const __m256i*)(lines + t * kLine + 32 * part));
    }
    for (int t = 0; t < 8; t += 4) {  // dwords 0 and 1, 2 and 3 of each quarter, of four planes
      for (int h = 0; h < 2; ++h) {
        const __m256i low = interleave(a[t], a[t + 1], h), high = interleave(a[t + 2], a[t + 3], h);
        b[t + 2 * h] = _mm256_unpacklo_epi64(low, high);
        b[t + 2 * h + 1] = _mm256_unpackhi_epi64(low, high);
      }
    }
    for (int d = 0; d < 4; ++d) {
      r.half[8 * part + d] = _mm256_permute2x128_si256(b[d], b[4 + d], 0x20);
      r.half[8 * part + 4 + d] = _mm256_permute2x128_si256(b[d], b[4 + d], 0x31);
    }
  }
  return r;
}

// For each of a step's elements a byte with the bits of eight tasks.
struct Pattern {
  alignas(32) uint8_t bytes[kStep];
};
CONDU_INLINE __m256i swap_bits(__m256i x, int shift, int64_t low) {
  const __m256i moved =
      _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, shift)), _mm256_set1_epi64x(low));
  return _mm256_xor_si256(x, _mm256_xor_si256(moved, _mm256_slli_epi64(moved, shift)));
}
// 32 elements at a time: four bytes of each plane become four 8x8 bit matrices, one in each 64-bit
// lane, and are transposed by three rounds of swaps.
CONDU_INLINE Pattern load_pattern(const Turned* turned, int s) {
  const __m256i by_byte = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i by_matrix = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  Pattern pattern;
  for (int half = 0; half < 2; ++half) {
    __m256i x = _mm256_shuffle_epi8(turned->half[2 * s + half], by_byte);
    x = _mm256_permutevar8x32_epi32(x, by_matrix);
    x = swap_bits(x, 7, 0x00aa00aa00aa00aa);
    x = swap_bits(x, 14, 0x0000cccc0000cccc);
    x = swap_bits(x, 28, 0x00000000f0f0f0f0);
    _mm256_store_si256((__m256i*)(pattern.bytes + 32 * half), x);
  }
  return pattern;
}

CONDU_INLINE int place_of_sum(int bits) { return bits; }
CONDU_INLINE int place_of_maximum(int bits) { return 16 + bits; }
// A permutation knows eight entries, those of three tasks; the fourth task is added to them, which
// is the order of the sum.
CONDU_INLINE void look_up_eight(const float* tables, const uint8_t* bytes, int half, __m256* sum,
                                __m256* largest) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
  const __m256i i = _mm256_srli_epi32(wide, 4 * half);  // the low three bits count
  const __m256i fourth = _mm256_srai_epi32(_mm256_slli_epi32(wide, 28 - 4 * half), 31);
  const __m256 last = _mm256_and_ps(_mm256_castsi256_ps(fourth), _mm256_set1_ps(tables[8]));
  *sum = _mm256_add_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(tables), i), last);
  *largest = _mm256_max_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(tables + 16), i), last);
}
// A group's entries for the lanes of vector v: the first four tasks' (half 0) or the others'.
CONDU_INLINE void look_up(const float* tables, const Pattern& p, int v, int half, Lanes* sum,
                          Lanes* largest) {
  look_up_eight(tables, p.bytes + kLanes * v, half, &sum->lo, &largest->lo);
  look_up_eight(tables, p.bytes + kLanes * v + 8, half, &sum->hi, &largest->hi);
}

CONDU_INLINE Lanes load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
CONDU_INLINE void store_f32(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
CONDU_INLINE void stream_f32(float* p, Lanes a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
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
CONDU_INLINE __m256i to_bf16(Lanes a) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(a.lo), round_to_bf16(a.hi));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
CONDU_INLINE void store_bf16(uint16_t* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
CONDU_INLINE void stream_bf16(uint16_t* p, Lanes a) {
  _mm256_stream_si256((__m256i*)p, to_bf16(a));
}
CONDU_INLINE Lanes load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
CONDU_INLINE __m256i to_f16(Lanes a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
}
CONDU_INLINE void store_f16(uint16_t* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, to_f16(a)); }
CONDU_INLINE void stream_f16(uint16_t* p, Lanes a) { _mm256_stream_si256((__m256i*)p, to_f16(a)); }

// Cache lines of mask bits.
CONDU_INLINE void store_line(uint8_t* p, const uint8_t* line, bool past_cache) {
  for (int b = 0; b < 64; b += 32) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(line + b));
    past_cache ? _mm256_stream_si256((__m256i*)(p + b), bits)
               : _mm256_storeu_si256((__m256i*)(p + b), bits);
  }
}
CONDU_INLINE void store_common(uint8_t* p, const uint8_t* a, const uint8_t* line, bool past_cache) {
  alignas(32) uint8_t both[64];
  for (int b = 0; b < 64; b += 32) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(a + b));
    _mm256_store_si256((__m256i*)(both + b),
                       _mm256_and_si256(bits, _mm256_load_si256((const __m256i*)(line + b))));
  }
  store_line(p, both, past_cache);
}

CONDU_INLINE void add_quarter(double* sums, __m128 a) {
  _mm256_store_pd(sums, _mm256_add_pd(_mm256_load_pd(sums), _mm256_cvtps_pd(a)));
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
