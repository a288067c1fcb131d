// Sixteen fp32 lanes in the compiler's portable vector types: SSE2 on x86-64, NEON on aarch64.
// Included once, by isa_baseline.cpp.
#pragma once
#include <stdint.h>
#include <string.h>

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

#define CONDU_EACH(result, expression) \
  do {                                 \
    for (int q = 0; q < 4; ++q) {      \
      (result).v[q] = (expression);    \
    }                                  \
    return (result);                   \
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
CONDU_INLINE Mask both(Mask a, Mask b) {
  Mask r;
  CONDU_EACH(r, a.v[q] & b.v[q]);
}
CONDU_INLINE Mask complement(Mask a) {
  Mask r;
  CONDU_EACH(r, ~a.v[q]);
}
CONDU_INLINE Mask mask_of(uint16_t bits) {
  const I4 weights = {1, 2, 4, 8};
  Mask r;
  CONDU_EACH(r, ((weights << (4 * q)) & (int32_t)bits) != 0);
}
CONDU_INLINE uint16_t bits_of(Mask a) {
  I4 sum = a.v[0] & I4{1, 2, 4, 8};
  for (int q = 1; q < 4; ++q) sum |= a.v[q] & (I4{1, 2, 4, 8} << (4 * q));
  return (uint16_t)(sum[0] | sum[1] | sum[2] | sum[3]);
}

CONDU_INLINE Lanes keep(Mask m, Lanes a) {
  Lanes r;
  CONDU_EACH(r, (F4)((I4)a.v[q] & m.v[q]));
}
CONDU_INLINE Lanes choose(Mask m, Lanes yes, Lanes no) {
  Lanes r;
  CONDU_EACH(r, pick(m.v[q], yes.v[q], no.v[q]));
}
CONDU_INLINE Lanes sign_where(Mask m) { return keep(m, splat(-0.0f)); }
CONDU_INLINE Lanes flip(Lanes a, Lanes sign) {
  Lanes r;
  CONDU_EACH(r, (F4)((I4)a.v[q] ^ (I4)sign.v[q]));
}
// Sums start at +0 and their terms are never -0, so adding +0 is the same as not adding.
CONDU_INLINE Lanes add_where(Lanes sum, Mask m, Lanes a) { return sum + keep(m, a); }
// For maxima that start at +0, of values that are not negative.
CONDU_INLINE Lanes max_where(Lanes largest, Mask m, Lanes a) { return max_of(keep(m, a), largest); }

CONDU_INLINE Lanes load_f32(const float* p) {
  Lanes r;
  memcpy(&r, p, sizeof r);
  return r;
}
CONDU_INLINE void store_f32(float* p, Lanes a) { memcpy(p, &a, sizeof a); }

CONDU_INLINE Lanes load_bf16(const uint16_t* p) {
  Lanes r;
  for (int q = 0; q < 4; ++q) {
    U4 wide = {p[4 * q], p[4 * q + 1], p[4 * q + 2], p[4 * q + 3]};
    r.v[q] = (F4)(wide << 16);
  }
  return r;
}
// To nearest, ties to even.
CONDU_INLINE void store_bf16(uint16_t* p, Lanes a) {
  for (int q = 0; q < 4; ++q) {
    const U4 x = (U4)a.v[q];
    const U4 up = x + ((x >> 16) & 1) + 0x7fff;
    const I4 nan = a.v[q] != a.v[q];
    const U4 r = (U4)pick(nan, (F4)(x | 0x00400000), (F4)up) >> 16;
    for (int l = 0; l < 4; ++l) p[4 * q + l] = (uint16_t)r[l];
  }
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
  for (int q = 0; q < 4; ++q) {
    for (int l = 0; l < 4; ++l) r.v[q][l] = half_to_float(p[4 * q + l]);
  }
  return r;
}
CONDU_INLINE void store_f16(uint16_t* p, Lanes a) {
  for (int q = 0; q < 4; ++q) {
    for (int l = 0; l < 4; ++l) p[4 * q + l] = float_to_half(a.v[q][l]);
  }
}

// sums[l] += lane l, in fp64.
CONDU_INLINE void add_to_double(double* sums, Lanes a) {
  for (int q = 0; q < 4; ++q) {
    for (int l = 0; l < 4; ++l) sums[4 * q + l] += (double)a.v[q][l];
  }
}

}  // namespace
}  // namespace condu
