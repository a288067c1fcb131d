// The three floating-point formats as bit patterns, for the host and for the GPU.
//
// With the sign cleared, a pattern grows with the magnitude that it stands for, so magnitudes can
// be compared and selected as integers, in every format and whatever the process has set for
// subnormals. Values are widened to the bits of fp32, which is exact, and narrowed from them to the
// nearest, ties to even. Branch-free, so that loops over them become vector code.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define CONDU_FORMAT static __host__ __device__ __forceinline__
#else
#define CONDU_FORMAT static inline __attribute__((always_inline))
#endif

CONDU_FORMAT float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

CONDU_FORMAT uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Both are computed. A plain conditional lets the compiler move one behind a branch, and then it
// makes no vector code of a floating-point operation.
CONDU_FORMAT uint32_t choose(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - (uint32_t)first;
  return (a & mask) | (b & ~mask);
}

struct Float32 {
  using Bits = uint32_t;
  using Signed = int32_t;
  static constexpr Bits kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

  CONDU_FORMAT uint32_t widen(Bits bits) { return bits; }
  CONDU_FORMAT Bits narrow(uint32_t bits) { return bits; }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Signed = int16_t;
  static constexpr Bits kMagnitude = 0x7fff, kInfinity = 0x7f80;

  CONDU_FORMAT uint32_t widen(Bits bits) { return (uint32_t)bits << 16; }
  CONDU_FORMAT Bits narrow(uint32_t bits) {
    const uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1);
    const bool nan = (bits & Float32::kMagnitude) > Float32::kInfinity;
    return (Bits)(choose(nan, bits | 0x00400000, nearest) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  using Signed = int16_t;
  static constexpr Bits kMagnitude = 0x7fff, kInfinity = 0x7c00;

  CONDU_FORMAT uint32_t widen(Bits bits) {
    const uint32_t magnitude = bits & kMagnitude, sign = (uint32_t)(bits & 0x8000) << 16;
    // The exponent's bias grows by 112; once more for infinity and NaN. Subnormals are multiples of
    // 2^-24 and normal numbers in fp32.
    const uint32_t normal =
        (magnitude << 13) + choose(magnitude >= kInfinity, 0x70000000, 0x38000000);
    const uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    return sign | choose(magnitude < 0x0400, subnormal, normal);
  }
  CONDU_FORMAT Bits narrow(uint32_t bits) {
    const uint32_t magnitude = bits & Float32::kMagnitude, sign = (bits >> 16) & 0x8000;
    // The last place of [0.5, 1) is fp16's smallest subnormal: the addition rounds to it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t finite = choose(magnitude < 0x38800000, subnormal, normal);
    const uint32_t infinite = choose(magnitude > Float32::kInfinity, 0x7e00, kInfinity);
    return (Bits)(sign | choose(magnitude < 0x47800000, finite, infinite));
  }
};
