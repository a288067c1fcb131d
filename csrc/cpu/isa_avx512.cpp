// Kernels for AVX-512 F, BW, DQ, VL, VBMI and GFNI; compiled with that instruction set's flags
// alone.
#include "cpu/simd_avx512.h"
#include "cpu/sixteens_avx512.h"
#include "cpu/table.h"

namespace condu {
extern const Kernels kAvx512Kernels = CONDU_KERNELS("avx512");
}
