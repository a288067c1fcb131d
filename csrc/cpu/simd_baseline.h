// Sixteen fp32 lanes in the compiler's portable vector types: SSE2 on x86-64, NEON on aarch64.
// Included once, by isa_baseline.cpp.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/kernels.h"

#define CONDU_INLINE static inline __attribute__((always_inline))

namespace condu {
namespace {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct Lanes {
  F4 v[4];
};
struct Mask {
  I4 v[4];  // all ones or all zeros in each lane
};

#define CONDU_EACH(result, expression)                                         \
  do {                                                                         \
    CONDU_UNROLL for (int q = 0; q < 4; ++q) { (result).v[q] = (expression); } \
    return (result);                                                           \
  } while (0)

CONDU_INLINE Lanes splat(float x) {
  Lanes r;
  CONDU_EACH(r, (F4{x, x, x, x}));
}
CONDU_INLINE Lanes operator+(Lanes a, Lanes b) {
  Lanes r;
  CONDU_EACH(r, a.v[q] + b.v[q]);
}
CONDU_INLINE Lanes operator-(Lanes a, Lanes b) {
  Lanes r;
  CONDU_EACH(r, a.v[q] - b.v[q]);
}
CONDU_INLINE Lanes operator*(Lanes a, Lanes b) {
  Lanes r;
  CONDU_EACH(r, a.v[q] * b.v[q]);
}
CONDU_INLINE F4 pick(I4 m, F4 yes, F4 no) { return (F4)(((I4)yes & m) | ((I4)no & ~m)); }
CONDU_INLINE Lanes max_of(Lanes a, Lanes b) {
  Lanes r;
  CONDU_EACH(r, pick(a.v[q] > b.v[q], a.v[q], b.v[q]));
}
CONDU_INLINE Lanes magnitude(Lanes a) {
  Lanes r;
  CONDU_EACH(r, (F4)((I4)a.v[q] & 0x7fffffff));
}

CONDU_INLINE Lanes without_negative_zero(Lanes a) { return a + splat(0.0f); }
CONDU_INLINE Lanes negate_unless(Lanes a, Lanes sign) {
  const int32_t bit = INT32_MIN;
  Lanes r;
  CONDU_EACH(r, (F4)((I4)a.v[q] ^ (~(I4)sign.v[q] & bit)));
}

CONDU_INLINE Mask above_zero(Lanes a) {
  Mask r;
  CONDU_EACH(r, a.v[q] > 0.0f);
}
CONDU_INLINE Mask below_zero(Lanes a) {
  Mask r;
  CONDU_EACH(r, a.v[q] < 0.0f);
}
CONDU_INLINE Mask either(Mask a, Mask b) {
  Mask r;
  CONDU_EACH(r, a.v[q] | b.v[q]);
}

// The lanes of each four mask bits.
struct SpreadBits {
  alignas(16) int32_t lanes[16][4];
};
constexpr SpreadBits spread_bits() {
  SpreadBits table{};
  for (int bits = 0; bits < 16; ++bits) {
    for (int l = 0; l < 4; ++l) table.lanes[bits][l] = bits >> l & 1 ? -1 : 0;
  }
  return table;
}
constexpr SpreadBits kSpreadBits = spread_bits();

CONDU_INLINE Mask load_mask(const uint8_t* p) {
  Mask r;
  CONDU_EACH(r, *(const I4*)kSpreadBits.lanes[p[q / 2] >> 4 * (q % 2) & 15]);
}
CONDU_INLINE int bits_of(I4 lanes) {
#if defined(__SSE2__)
  return _mm_movemask_ps((__m128)lanes);
#else
  lanes &= I4{1, 2, 4, 8};
  return lanes[0] | lanes[1] | lanes[2] | lanes[3];
#endif
}
CONDU_INLINE void store_mask(uint8_t* p, Mask a) {
  p[0] = (uint8_t)(bits_of(a.v[0]) | bits_of(a.v[1]) << 4);
  p[1] = (uint8_t)(bits_of(a.v[2]) | bits_of(a.v[3]) << 4);
}

CONDU_INLINE Lanes keep(Mask m, Lanes a) {
  Lanes r;
  CONDU_EACH(r, (F4)((I4)a.v[q] & m.v[q]));
}
CONDU_INLINE Lanes choose(Mask m, Lanes yes, Lanes no) {
  Lanes r;
  CONDU_EACH(r, pick(m.v[q], yes.v[q], no.v[q]));
}
// Sums start at +0 and their terms are never -0, so adding +0 is the same as not adding.
CONDU_INLINE Lanes add_where(Lanes sum, Mask m, Lanes a) { return sum + keep(m, a); }

// Eight planes' lines; a step's bits are turned when they are used.
struct Turned {
  const uint8_t* lines;
};
CONDU_INLINE Turned turn_lines(const uint8_t* lines) { return {lines}; }

// For each of a step's elements a byte with the bits of eight tasks: byte 8 i + b is element 8 b +
// i.
struct Pattern {
  uint8_t bytes[kStep];
};
// Three rounds of swaps between the planes' words of 64 bits: a transposition of 8x8 bits for each
// byte of the words.
CONDU_INLINE void swap_bits(uint64_t* a, uint64_t* b, int shift, uint64_t low) {
  const uint64_t moved = ((*a >> shift) ^ *b) & low;
  *a ^= moved << shift;
  *b ^= moved;
}
CONDU_INLINE Pattern load_pattern(const Turned* turned, int s) {
  uint64_t words[8];
  for (int t = 0; t < 8; ++t) memcpy(words + t, turned->lines + t * kLine + 8 * s, 8);
  for (int t = 0; t < 8; t += 2) swap_bits(words + t, words + t + 1, 1, 0x5555555555555555);
  for (int t = 0; t < 8; ++t) {
    if (!(t & 2)) swap_bits(words + t, words + t + 2, 2, 0x3333333333333333);
  }
  for (int t = 0; t < 4; ++t) swap_bits(words + t, words + t + 4, 4, 0x0f0f0f0f0f0f0f0f);
  Pattern pattern;
  memcpy(pattern.bytes, words, sizeof words);
  return pattern;
}

// A sum beside its maximum, so that one load brings both.
CONDU_INLINE int place_of_sum(int bits) { return 2 * bits; }
CONDU_INLINE int place_of_maximum(int bits) { return 2 * bits + 1; }
typedef double Pairs __attribute__((vector_size(16)));  // of floats, moved whole
CONDU_INLINE F4 entries(const float* tables, const Pattern& p, int element, int half) {
  const int at[2] = {8 * (element % 8) + element / 8, 8 * ((element + 1) % 8) + element / 8};
  double pair[2];
  for (int k = 0; k < 2; ++k) {
    memcpy(pair + k, tables + 2 * (p.bytes[at[k]] >> 4 * half & 15), sizeof(double));
  }
  return (F4)Pairs{pair[0], pair[1]};
}
// A group's entries for the lanes of vector v: the first four tasks' (half 0) or the others'.
CONDU_INLINE void look_up(const float* tables, const Pattern& p, int v, int half, Lanes* sum,
                          Lanes* largest) {
  CONDU_UNROLL for (int q = 0; q < 4; ++q) {
    const F4 low = entries(tables, p, 16 * v + 4 * q, half);
    const F4 high = entries(tables, p, 16 * v + 4 * q + 2, half);
    sum->v[q] = __builtin_shuffle(low, high, I4{0, 2, 4, 6});
    largest->v[q] = __builtin_shuffle(low, high, I4{1, 3, 5, 7});
  }
}

CONDU_INLINE Lanes load_f32(const float* p) {
  Lanes r;
  memcpy(&r, p, sizeof r);
  return r;
}
CONDU_INLINE void store_f32(float* p, Lanes a) { memcpy(p, &a, sizeof a); }
// Stores past the caches where the architecture has them: sixteen aligned bytes.
CONDU_INLINE void stream_16(void* p, const void* value) {
#if defined(__SSE2__)
  __m128 lanes;
  memcpy(&lanes, value, sizeof lanes);
  _mm_stream_ps((float*)p, lanes);
#else
  memcpy(p, value, 16);
#endif
}
CONDU_INLINE void stream_f32(float* p, Lanes a) {
  for (int q = 0; q < 4; ++q) stream_16(p + 4 * q, &a.v[q]);
}
CONDU_INLINE void stream_narrow(uint16_t* p, const uint16_t* narrow) {
  stream_16(p, narrow);
  stream_16(p + 8, narrow + 8);
}

CONDU_INLINE Lanes load_bf16(const uint16_t* p) {
  Lanes r;
  CONDU_UNROLL for (int q = 0; q < 4; ++q) {
    U4 wide = {p[4 * q], p[4 * q + 1], p[4 * q + 2], p[4 * q + 3]};
    r.v[q] = (F4)(wide << 16);
  }
  return r;
}
// To nearest, ties to even.
CONDU_INLINE void store_bf16(uint16_t* p, Lanes a) {
  CONDU_UNROLL for (int q = 0; q < 4; ++q) {
    const U4 x = (U4)a.v[q];
    const U4 up = x + ((x >> 16) & 1) + 0x7fff;
    const I4 nan = a.v[q] != a.v[q];
    const U4 r = (U4)pick(nan, (F4)(x | 0x00400000), (F4)up) >> 16;
    for (int l = 0; l < 4; ++l) p[4 * q + l] = (uint16_t)r[l];
  }
}

CONDU_INLINE void stream_bf16(uint16_t* p, Lanes a) {
  alignas(16) uint16_t narrow[16];
  store_bf16(narrow, a);
  stream_narrow(p, narrow);
}

// fp16 by integer arithmetic: this instruction set has no conversion of its own.
static __attribute__((noinline)) float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31;
  uint32_t mantissa = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13) | (mantissa ? 0x00400000 : 0);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa) {  // subnormal: shift the leading one into place
    const int shift = __builtin_clz(mantissa) - 21;
    bits = sign | ((uint32_t)(113 - shift) << 23) | (((mantissa << shift) & 0x3ff) << 13);
  } else {
    bits = sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static __attribute__((noinline)) uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  const uint32_t x = bits & 0x7fffffff;
  if (x > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((x >> 13) & 0x3ff));
  if (x >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds beyond 65504
  if (x >= 0x38800000) {                                  // normal
    const uint32_t odd = (x >> 13) & 1;
    return (uint16_t)(sign | ((x - 0x38000000 + 0xfff + odd) >> 13));
  }
  if (x < 0x33000000) return sign;  // below half of the smallest subnormal
  const int shift = 126 - (int)(x >> 23);
  const uint32_t mantissa = (x & 0x7fffff) | 0x800000;
  const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return (uint16_t)(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
}
CONDU_INLINE Lanes load_f16(const uint16_t* p) {
  Lanes r;
  CONDU_UNROLL for (int q = 0; q < 4; ++q) {
    for (int l = 0; l < 4; ++l) r.v[q][l] = half_to_float(p[4 * q + l]);
  }
  return r;
}
CONDU_INLINE void store_f16(uint16_t* p, Lanes a) {
  CONDU_UNROLL for (int q = 0; q < 4; ++q) {
    for (int l = 0; l < 4; ++l) p[4 * q + l] = float_to_half(a.v[q][l]);
  }
}

CONDU_INLINE void stream_f16(uint16_t* p, Lanes a) {
  alignas(16) uint16_t narrow[16];
  store_f16(narrow, a);
  stream_narrow(p, narrow);
}

// Cache lines of mask bits.
CONDU_INLINE void store_line(uint8_t* p, const uint8_t* line, bool past_cache) {
  for (int b = 0; b < 64; b += 16)
    past_cache ? stream_16(p + b, line + b) : (void)memcpy(p + b, line + b, 16);
}
CONDU_INLINE void store_common(uint8_t* p, const uint8_t* a, const uint8_t* line, bool past_cache) {
  alignas(16) uint64_t both[8], kept[8];
  memcpy(both, a, sizeof both);
  memcpy(kept, line, sizeof kept);
  for (int w = 0; w < 8; ++w) both[w] &= kept[w];
  store_line(p, (const uint8_t*)both, past_cache);
}

// sums[l] += lane l, in fp64.
CONDU_INLINE void add_to_double(double* sums, Lanes a) {
  CONDU_UNROLL for (int q = 0; q < 4; ++q) {
    for (int l = 0; l < 4; ++l) sums[4 * q + l] += (double)a.v[q][l];
  }
}

}  // namespace
}  // namespace condu
