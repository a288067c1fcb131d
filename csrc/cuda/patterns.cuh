// Elements of a chunk as bit patterns (formats.h): vectors of 16 bytes where the chunk's kind
// allows them, else one element of any dtype at a time.
#pragma once
#include "cuda/launch.cuh"
#include "formats.h"

template <int kKind>
struct FormatOf {
  using Type = Float32;
};
template <>
struct FormatOf<CONDU_ALL_BF16> {
  using Type = BFloat16;
};
template <>
struct FormatOf<CONDU_ALL_F16> {
  using Type = Float16;
};

// 16 bytes of neighbouring elements.
template <class Format>
struct Pack {
  using Bits = typename Format::Bits;
  enum { kElements = 16 / sizeof(Bits), kShift = 8 * sizeof(Bits) % 32 };
  uint32_t word[4];

  __device__ __forceinline__ explicit Pack(uint4 v) : word{v.x, v.y, v.z, v.w} {}
  __device__ __forceinline__ uint4 vector() const {
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
  __device__ __forceinline__ Bits get(int j) const {
    return kShift != 0 ? (Bits)(word[j / 2] >> (kShift * (j & 1))) : (Bits)word[j];
  }
  __device__ __forceinline__ void put(int j, Bits bits) {
    if (kShift == 0) {
      word[j] = bits;
    } else {
      const int at = kShift * (j & 1);
      word[j / 2] = (word[j / 2] & ~(0xffffu << at)) | (uint32_t)bits << at;
    }
  }
};

// The part of a chunk that a tile covers: elements [first, end).
struct Span {
  int first, end;
  __device__ __forceinline__ explicit Span(const Tile& tile) : first(tile.first) {
    const int most = tile.first + CONDU_TILE;
    end = most < tile.chunk.elements ? most : tile.chunk.elements;
  }
};

// One element, widened to fp32.
CONDU_DEVICE uint32_t widened(Stream s, int i) {
  if (s.dtype == CONDU_F32) return ((const uint32_t*)s.data)[i];
  const uint16_t bits = ((const uint16_t*)s.data)[i];
  return s.dtype == CONDU_BF16 ? BFloat16::widen(bits) : Float16::widen(bits);
}

// Writes one element, rounded from fp32.
CONDU_DEVICE void put_narrowed(Stream s, int i, uint32_t bits) {
  if (s.dtype == CONDU_F32) {
    ((uint32_t*)s.data)[i] = bits;
  } else {
    ((uint16_t*)s.data)[i] = s.dtype == CONDU_BF16 ? BFloat16::narrow(bits) : Float16::narrow(bits);
  }
}
