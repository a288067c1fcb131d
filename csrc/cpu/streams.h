// Loading models and storing results: sixteen lanes at a time, any dtype, the end of a tensor.
#pragma once
#include <string.h>

#include "cpu/kernels.h"

namespace condu {
namespace {

#define CONDU_RARE static __attribute__((noinline))

// How far ahead a stream is asked for, in bytes: far where there are few, near where there are
// many.
enum { kFar = 2048, kNear = 512 };

CONDU_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch((const char*)p + b);
}

CONDU_INLINE Lanes through_bf16(Lanes a) {
  uint16_t narrow[kLanes];
  store_bf16(narrow, a);
  return load_bf16(narrow);
}

CONDU_INLINE Lanes through_f16(Lanes a) {
  uint16_t narrow[kLanes];
  store_f16(narrow, a);
  return load_f16(narrow);
}

// Rounding through another type on the way; out of line, as it is rare and long.
CONDU_RARE Lanes load_through(Stream s, int64_t i) {
  const float* wide = (const float*)s.data + i;
  const uint16_t* narrow = (const uint16_t*)s.data + i;
  switch (s.dtype) {
    case CONDU_F32_VIA_BF16:
      return through_bf16(load_f32(wide));
    case CONDU_F32_VIA_F16:
      return through_f16(load_f32(wide));
    case CONDU_BF16_VIA_F16:
      return through_f16(load_bf16(narrow));
    default:
      return through_bf16(load_f16(narrow));
  }
}

template <int kKind>
CONDU_INLINE Lanes load(Stream s, int64_t i) {
  switch (kKind == kMixed ? s.dtype : kKind) {
    case CONDU_F32:
      return load_f32((const float*)s.data + i);
    case CONDU_BF16:
      return load_bf16((const uint16_t*)s.data + i);
    case CONDU_F16:
      return load_f16((const uint16_t*)s.data + i);
    default:
      return load_through(s, i);
  }
}

template <int kKind>
CONDU_INLINE void prefetch(Stream s, int64_t i, int ahead) {
  const int size = kKind == kMixed ? size_of(s.dtype) : size_of(kKind);
  if (s.data) prefetch((const char*)s.data + i * size + ahead, kStep * size);
}

template <int kKind>
CONDU_INLINE Lanes load_delta(Stream model, Stream base, int64_t i) {
  const Lanes theta = load<kKind>(model, i);
  return base.data ? theta - load<kKind>(base, i) : theta;
}

// A tensor's elements from `i` to its `end`, less than a step, followed by zeros.
CONDU_RARE Stream pad(Stream s, int64_t i, int64_t end, char* padded) {
  if (!s.data) return s;
  const int size = size_of(s.dtype);
  memset(padded, 0, kStep * size);
  if (i < end) memcpy(padded, (const char*)s.data + i * size, (size_t)(end - i) * size);
  return {padded, s.dtype};
}

template <int kKind>
CONDU_INLINE void store(void* out, uint8_t dtype, int64_t i, Lanes value, bool past_cache) {
  float* wide = (float*)out + i;
  uint16_t* narrow = (uint16_t*)out + i;
  switch (kKind == kMixed ? dtype : kKind) {
    case CONDU_F32:
      return past_cache ? stream_f32(wide, value) : store_f32(wide, value);
    case CONDU_BF16:
      return past_cache ? stream_bf16(narrow, value) : store_bf16(narrow, value);
    default:
      return past_cache ? stream_f16(narrow, value) : store_f16(narrow, value);
  }
}

template <bool kBf16>
CONDU_INLINE Lanes load_unified(const void* u, int64_t i) {
  return kBf16 ? load_bf16((const uint16_t*)u + i) : load_f32((const float*)u + i);
}

template <bool kBf16>
CONDU_INLINE void prefetch_unified(const void* u, int64_t i) {
  const int size = kBf16 ? 2 : 4;
  prefetch((const char*)u + i * size + kFar, kStep * size);
}

// Stores the unified delta and returns its magnitude as stored, which is `size` before rounding.
template <bool kBf16>
CONDU_INLINE Lanes store_unified(void* u, int64_t i, Lanes value, Lanes size, bool past_cache) {
  store<kBf16 ? CONDU_BF16 : CONDU_F32>(u, 0, i, value, past_cache);
  return kBf16 ? through_bf16(size) : size;
}

}  // namespace
}  // namespace condu
