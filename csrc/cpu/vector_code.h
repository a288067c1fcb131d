// Plain loops compiled for every instruction set, in one file and without -m flags: the loop is
// inlined into a function that the compiler may give wider vectors.
//
// Measured on aligned merging, 128 Ki elements in cache, one thread: AVX2 takes .47 to .58 and
// AVX-512 .28 to .44 of the baseline's time (averaging fp32: .79 and .74). Results cannot differ:
// the build forbids contraction to FMA.
#pragma once
#include <string.h>

#include "condu_ext.h"

// For the lambda given to with_vectors, and for the functions that it calls.
#define CONDU_INLINED __attribute__((always_inline))

namespace condu {
namespace {

enum class Vectors { kBaseline, kAvx2, kAvx512 };

// Follows the fusion kernels' choice, and so CONDU_CPU_ISA.
Vectors widest_vectors() {
  const char* isa = condu_cpu_isa();
  if (isa && !strcmp(isa, "avx512")) return Vectors::kAvx512;
  if (isa && !strcmp(isa, "avx2")) return Vectors::kAvx2;
  return Vectors::kBaseline;
}

#if defined(__x86_64__)
template <class Work>
__attribute__((target("avx2"))) void with_avx2(const Work& work) {
  work();
}
template <class Work>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void
with_avx512(const Work& work) {
  work();
}
#endif

template <class Work>
void with_vectors(Vectors vectors, const Work& work) {
#if defined(__x86_64__)
  if (vectors == Vectors::kAvx512) return with_avx512(work);
  if (vectors == Vectors::kAvx2) return with_avx2(work);
#endif
  (void)vectors;
  work();
}

}  // namespace
}  // namespace condu
