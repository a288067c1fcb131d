// How the elements of a tile are shared among threads, and how they are read and written.
//
// A warp takes runs of 256 elements, a thread eight of them: an *octet*, one byte of every mask.
// In 2-byte types the eight are neighbours, one 16-byte load. In fp32 two 16-byte loads of
// neighbouring threads should touch neighbouring memory, so a thread's octet is four elements of
// the run's first half and four of its second; its mask bits then are one nibble of each of two
// bytes, and pairs of threads exchange nibbles on the way from and to memory (swap_nibbles).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "condu_cuda.h"
#include "cuda/lanes.cuh"

enum {
  kThreads = 256,
  kWarps = kThreads / 32,
  kRun = 256,
  kOctets = CONDU_TILE / (8 * kThreads),  // of a thread
};

// Where the octet of the calling thread lies in its run.
template <bool kWide>
struct Seat {
  int lane = threadIdx.x & 31;
  // First element of one half of the octet.
  __device__ __forceinline__ int quad(int half) const {
    return kWide ? 128 * half + 4 * lane : 8 * lane + 4 * half;
  }
  // The byte of the run's mask that this thread reads and writes.
  __device__ __forceinline__ int byte() const { return kWide ? 16 * (lane & 1) + lane / 2 : lane; }
};

// From bytes of masks as in memory to bytes as in octets, or back: it is its own inverse. Every
// byte of the word is another mask. All threads of the warp take part.
template <bool kWide>
CONDU_DEVICE uint32_t swap_nibbles(uint32_t own) {
  if (!kWide) return own;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
  return threadIdx.x & 1 ? (own & 0xf0f0f0f0u) | ((other >> 4) & 0x0f0f0f0fu)
                         : (own & 0x0f0f0f0fu) | ((other & 0x0f0f0f0fu) << 4);
}

// ---- one element -------------------------------------------------------------------------------

CONDU_DEVICE float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
CONDU_DEVICE float from_f16(uint32_t bits) {
  return __half2float(__ushort_as_half((unsigned short)bits));
}
// Two values at once: one instruction at full rate, where one value takes a slow one.
CONDU_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | (uint32_t)__bfloat16_as_ushort(pair.y) << 16;
}
CONDU_DEVICE uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | (uint32_t)__half_as_ushort(pair.y) << 16;
}
CONDU_DEVICE float upper_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

CONDU_DEVICE bool is_four_bytes(uint8_t dtype) {
  return dtype == CONDU_F32 || dtype == CONDU_F32_VIA_BF16 || dtype == CONDU_F32_VIA_F16;
}

// The value of an element, from its bits in the low part of a word.
CONDU_DEVICE float value_of(uint32_t bits, uint8_t dtype) {
  switch (dtype) {
    case CONDU_F32:
      return __uint_as_float(bits);
    case CONDU_BF16:
      return from_bf16(bits);
    case CONDU_F16:
      return from_f16(bits);
    case CONDU_F32_VIA_BF16:
      return from_bf16(pack_bf16(__uint_as_float(bits), 0.0f));
    case CONDU_F32_VIA_F16:
      return from_f16(pack_f16(__uint_as_float(bits), 0.0f));
    case CONDU_BF16_VIA_F16:
      return from_f16(pack_f16(from_bf16(bits), 0.0f));
    default:
      return from_bf16(pack_bf16(from_f16(bits), 0.0f));
  }
}

// ---- models ------------------------------------------------------------------------------------

// A tensor from a chunk's first element on.
struct Stream {
  const char* data;
  uint8_t dtype;  // read in general chunks alone
};

// An octet is computed on as two *quads* of four elements; one 16-byte load brings both of a 2-byte
// type, or one in fp32. A part is such a load before conversion: few registers, so that many can be
// in flight. Elements from `end` on are not read and count as zero.
template <int kKind>
struct Part;

template <>
struct Part<CONDU_ALL_F32> {
  enum { kQuads = 1, kWide = true };
  uint4 bits;
  __device__ __forceinline__ void load(Stream s, int at, int part, int end) {
    const int i = at + Seat<true>().quad(part);
    bits = i < end ? __ldg((const uint4*)(s.data + 4 * i)) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void unpack(Stream, int, float* v) const {
    v[0] = __uint_as_float(bits.x);
    v[1] = __uint_as_float(bits.y);
    v[2] = __uint_as_float(bits.z);
    v[3] = __uint_as_float(bits.w);
  }
};

template <>
struct Part<CONDU_ALL_BF16> {
  enum { kQuads = 2, kWide = false };
  uint4 bits;
  __device__ __forceinline__ void load(Stream s, int at, int, int end) {
    const int i = at + Seat<false>().quad(0);
    bits = i < end ? __ldg((const uint4*)(s.data + 2 * i)) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void unpack(Stream, int quad, float* v) const {
    const uint32_t low = quad ? bits.z : bits.x, high = quad ? bits.w : bits.y;
    v[0] = from_bf16(low);
    v[1] = upper_bf16(low);
    v[2] = from_bf16(high);
    v[3] = upper_bf16(high);
  }
};

template <>
struct Part<CONDU_ALL_F16> : Part<CONDU_ALL_BF16> {
  __device__ __forceinline__ void unpack(Stream, int quad, float* v) const {
    const uint32_t low = quad ? bits.z : bits.x, high = quad ? bits.w : bits.y;
    v[0] = from_f16(low & 0xffffu);
    v[1] = from_f16(low >> 16);
    v[2] = from_f16(high & 0xffffu);
    v[3] = from_f16(high >> 16);
  }
};

// Any dtype at any address; one word an element.
template <>
struct Part<CONDU_GENERAL> {
  enum { kQuads = 2, kWide = false };
  uint32_t word[8];
  __device__ __forceinline__ void load(Stream s, int at, int, int end) {
    const int i = at + Seat<false>().quad(0);
    const int size = is_four_bytes(s.dtype) ? 4 : 2;
    const char* from = s.data + size * i;
    if (i + 8 <= end && (uintptr_t)from % 16 == 0) {
      const uint4 low = __ldg((const uint4*)from);
      const uint4 high = size == 4 ? __ldg((const uint4*)from + 1) : low;
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      for (int j = 0; j < 8; ++j) {
        word[j] = size == 4 ? words[j] : words[j / 2] >> (16 * (j & 1)) & 0xffffu;
      }
      return;
    }
    for (int j = 0; j < 8; ++j) {
      word[j] = 0;
      if (i + j >= end) continue;
      word[j] = size == 4 ? __ldg((const uint32_t*)from + j) : __ldg((const uint16_t*)from + j);
    }
  }
  __device__ __forceinline__ void unpack(Stream s, int quad, float* v) const {
    for (int j = 0; j < 4; ++j) v[j] = value_of(word[4 * quad + j], s.dtype);
  }
};

// A base model's quad; zeros where there is no base, for d - 0 is d.
template <int kKind>
CONDU_DEVICE void unpack_base(const Part<kKind>& part, Stream base, int quad, float* v) {
  if (base.data) {
    part.unpack(base, quad, v);
  } else {
    for (int j = 0; j < 4; ++j) v[j] = 0.0f;
  }
}

// d = model - base of a quad.
template <int kKind>
CONDU_DEVICE void delta(const Part<kKind>& part, Stream model, int quad, const float* base,
                        float* d) {
  part.unpack(model, quad, d);
  for (int j = 0; j < 4; ++j) d[j] = __fsub_rn(d[j], base[j]);
}

// A whole octet.
template <int kKind>
struct Octet {
  enum { kQuads = Part<kKind>::kQuads, kParts = 2 / kQuads };
  Part<kKind> part[kParts];
  __device__ __forceinline__ void load(Stream s, int at, int end) {
    for (int p = 0; p < kParts; ++p) part[p].load(s, at, p, end);
  }
  __device__ __forceinline__ const Part<kKind>& of(int quad) const { return part[quad / kQuads]; }
};

// ---- unified deltas ----------------------------------------------------------------------------

// Arenas are aligned and padded, so every octet of a run is whole. They may be written in place, so
// they are never read through the read-only path. The intrinsics keep accesses 16 bytes wide, which
// the compiler otherwise may split.
template <bool kWide, bool kBf16>
struct RawUnified {
  uint4 half[2];
  __device__ __forceinline__ void load(const void* u, int64_t at) {
    const Seat<kWide> seat;
    if (!kBf16) {
      half[0] = __ldcs((const uint4*)((const float*)u + at + seat.quad(0)));
      half[1] = __ldcs((const uint4*)((const float*)u + at + seat.quad(1)));
    } else if (!kWide) {
      half[0] = __ldcs((const uint4*)((const uint16_t*)u + at + seat.quad(0)));
    } else {
      const uint2 a = __ldcs((const uint2*)((const uint16_t*)u + at + seat.quad(0)));
      const uint2 b = __ldcs((const uint2*)((const uint16_t*)u + at + seat.quad(1)));
      half[0] = make_uint4(a.x, a.y, b.x, b.y);
    }
  }
  __device__ __forceinline__ void unpack(float* v) const {
    if (kBf16) {
      for (int q = 0; q < 2; ++q) Part<CONDU_ALL_BF16>{half[0]}.unpack({}, q, v + 4 * q);
    } else {
      for (int q = 0; q < 2; ++q) Part<CONDU_ALL_F32>{half[q]}.unpack({}, 0, v + 4 * q);
    }
  }
};

// Stores the unified delta and replaces it by its magnitude as stored.
template <bool kWide, bool kBf16>
CONDU_DEVICE void store_unified(void* u, int64_t at, float* v) {
  const Seat<kWide> seat;
  uint32_t words[8];
  if (kBf16) {
    for (int w = 0; w < 4; ++w) {
      words[w] = pack_bf16(v[2 * w], v[2 * w + 1]);
      v[2 * w] = from_bf16(words[w]);
      v[2 * w + 1] = upper_bf16(words[w]);
    }
    if (kWide) {
      __stcs((uint2*)((uint16_t*)u + at + seat.quad(0)), make_uint2(words[0], words[1]));
      __stcs((uint2*)((uint16_t*)u + at + seat.quad(1)), make_uint2(words[2], words[3]));
    } else {
      __stcs((uint4*)((uint16_t*)u + at + seat.quad(0)),
             make_uint4(words[0], words[1], words[2], words[3]));
    }
  } else {
    for (int j = 0; j < 8; ++j) words[j] = __float_as_uint(v[j]);
    for (int h = 0; h < 2; ++h) {
      __stcs((uint4*)((float*)u + at + seat.quad(h)),
             make_uint4(words[4 * h], words[4 * h + 1], words[4 * h + 2], words[4 * h + 3]));
    }
  }
  for (int j = 0; j < 8; ++j) v[j] = fabsf(v[j]);
}

// ---- masks -------------------------------------------------------------------------------------

// The compiler cannot know that an address read from shared memory is one of global memory.
template <class T>
CONDU_DEVICE T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// Bytes of up to eight masks for an octet; byte t is that of task t, bit j that of element j.
struct MaskBytes {
  uint32_t word[2];
  __device__ __forceinline__ uint32_t of(int t) const { return word[t / 4] >> (8 * (t % 4)); }
  __device__ __forceinline__ void keep_only(uint32_t elements) {
    for (int w = 0; w < 2; ++w) word[w] &= elements * 0x01010101u;
  }
  template <bool kWide>
  __device__ __forceinline__ void swap() {
    for (int w = 0; w < 2; ++w) word[w] = swap_nibbles<kWide>(word[w]);
  }
};

// Reads bytes as they are in memory from `count` planes, at most kMost; the planes beyond are
// empty. `byte` is the run's first. Planes may be written in place: never through the read-only
// path.
template <bool kWide, int kMost = 8>
CONDU_DEVICE MaskBytes load_bytes(const uint8_t* const* planes, int count, int64_t byte) {
  const int64_t at = byte + Seat<kWide>().byte();
  MaskBytes masks = {{0, 0}};
  for (int t = 0; t < kMost; ++t) {
    if (t < count) masks.word[t / 4] |= (uint32_t)global(planes[t])[at] << (8 * (t % 4));
  }
  return masks;
}

template <bool kWide>
CONDU_DEVICE MaskBytes load_masks(const uint8_t* const* planes, int count, int64_t byte) {
  MaskBytes masks = load_bytes<kWide>(planes, count, byte);
  masks.swap<kWide>();
  return masks;
}

template <bool kWide, int kMost = 8>
CONDU_DEVICE void store_masks(uint8_t* const* planes, int count, int64_t byte, MaskBytes masks) {
  const int64_t at = byte + Seat<kWide>().byte();
  masks.swap<kWide>();
  for (int t = 0; t < kMost; ++t) {
    if (t < count) global(planes[t])[at] = (uint8_t)masks.of(t);
  }
}
