// fp16 conversions in the compiler's own type: to nearest, ties to even, with subnormals.
#pragma once
#include "cuda_runtime.h"

typedef _Float16 __half;
static inline __half __ushort_as_half(unsigned short a) { return same_bits<__half>(a); }
static inline unsigned short __half_as_ushort(__half a) { return same_bits<unsigned short>(a); }
static inline float __half2float(__half a) { return (float)a; }
struct __half2 {
  __half x, y;
};
static inline __half2 __floats2half2_rn(float a, float b) { return {(__half)a, (__half)b}; }
