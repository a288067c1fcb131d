// A copy with stores past the caches: the ceiling that benchmarks hold the kernels against.
#include <string.h>

#include "cpu/memory.h"

extern "C" int condu_copy(void* to, const void* from, int64_t bytes, int threads) {
  if (bytes < 0 || threads < 1) return CONDU_BAD_ARGUMENT;
  if (bytes && (!to || !from)) return CONDU_NULL_POINTER;
  const int64_t share = (bytes / threads + 4095) / 4096 * 4096;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t start = share * thread < bytes ? share * thread : bytes;
    const int64_t end = start + share < bytes && thread + 1 < threads ? start + share : bytes;
    char* t = (char*)to + start;
    const char *f = (const char*)from + start, *last = (const char*)from + end;
#if defined(__x86_64__)
    if ((uintptr_t)t % 16 == 0) {
      for (; f + 64 <= last; f += 64, t += 64) {
        const __m128i a = _mm_loadu_si128((const __m128i*)f);
        const __m128i b = _mm_loadu_si128((const __m128i*)(f + 16));
        const __m128i c = _mm_loadu_si128((const __m128i*)(f + 32));
        const __m128i d = _mm_loadu_si128((const __m128i*)(f + 48));
        _mm_stream_si128((__m128i*)t, a);
        _mm_stream_si128((__m128i*)(t + 16), b);
        _mm_stream_si128((__m128i*)(t + 32), c);
        _mm_stream_si128((__m128i*)(t + 48), d);
      }
    }
#endif
    memcpy(t, f, (size_t)(last - f));
    condu::finish_streaming();
  }
  return CONDU_OK;
}
