// bf16: the upper half of an fp32, to nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
static inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const uint32_t x = same_bits<uint32_t>(a);
  if (a != a) return {0x7fff};
  return {(unsigned short)((x + 0x7fff + (x >> 16 & 1)) >> 16)};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
