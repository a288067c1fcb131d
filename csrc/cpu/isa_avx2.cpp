// Kernels for AVX2 and F16C; compiled with that instruction set's flags alone.
#include "cpu/simd_avx2.h"
#include "cpu/table.h"

namespace condu {
extern const Kernels kAvx2Kernels = CONDU_KERNELS("avx2");
}
