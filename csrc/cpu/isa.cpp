// Which instruction set's kernels run: chosen at first use.
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels.h"

namespace condu {

namespace {

const Kernels* choose_kernels() {
  const char* wanted = getenv("CONDU_CPU_ISA");
  const bool any = !wanted || !*wanted;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("gfni");
  if (avx512 && (any || !strcmp(wanted, "avx512"))) return &kAvx512Kernels;
  if (avx2 && (any || !strcmp(wanted, "avx2"))) return &kAvx2Kernels;
#endif
  if (any || !strcmp(wanted, "baseline")) return &kBaselineKernels;
  return nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose_kernels();
  return chosen;
}

}  // namespace condu

extern "C" const char* condu_cpu_isa(void) {
  return condu::kernels() ? condu::kernels()->name : nullptr;
}
