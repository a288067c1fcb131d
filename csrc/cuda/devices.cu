// What the CUDA side reports of itself. The runtime is linked statically, so this works (and says
// 0) on a machine without a driver.
#include <cuda_runtime.h>

#include "condu_ext.h"

extern "C" int condu_cuda_devices(void) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return devices;
  cudaGetLastError();  // not sticky for the next caller
  return 0;
}
