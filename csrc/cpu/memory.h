// How results reach memory: huge pages, stores past the caches.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace condu {
namespace {

inline int64_t elements_of(const condu_layout* layout) {
  int64_t elements = 0;
  for (int64_t k = 0; k < layout->tensors; ++k) elements += layout->numel[k];
  return elements;
}

// Stores past the caches become visible in any order; later reads must see all of them.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Whether results go past the caches. A model this large has left them before it is read again, and
// a line stored past them need not be read first. Below, the next reader may find it there.
inline bool past_cache(const condu_layout* layout) {
  constexpr int64_t kLarge = (int64_t)16 << 20;  // elements
  return elements_of(layout) >= kLarge;
}

inline bool on_line(const void* p) { return (uintptr_t)p % kLine == 0; }

inline bool on_lines(const condu_output* out, int tasks) {
  bool all = on_line(out->u);
  for (int t = 0; t < tasks; ++t) all = all && on_line(out->planes[t]);
  return all;
}

// Fewer page faults for memory that the kernels touch first; only a hint.
inline void expect_large(void* start, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t huge = (uintptr_t)2 << 20;
  const uintptr_t from = ((uintptr_t)start + huge - 1) / huge * huge;
  const uintptr_t to = ((uintptr_t)start + bytes) / huge * huge;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

inline void expect_large(const condu_layout* layout, const condu_output* out, int tasks) {
  if (!elements_of(layout)) return;  // then there may be no memory at all
  const int64_t last = layout->tensors - 1;
  const int64_t elements = layout->offset[last] + layout->numel[last];
  expect_large(out->u, elements * size_of(out->dtype));
  for (int t = 0; t < tasks; ++t) expect_large(out->planes[t], elements / 8);
}

}  // namespace
}  // namespace condu
