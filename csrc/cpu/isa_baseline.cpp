// Kernels for every processor of the target architecture; compiled with that instruction set's
// flags alone.
#include "cpu/simd_baseline.h"
#include "cpu/table.h"

namespace condu {
extern const Kernels kBaselineKernels = CONDU_KERNELS("baseline");
}
