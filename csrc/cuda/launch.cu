// The kernels that every operation uses, and what the CUDA side reports of itself.
#include <algorithm>

#include "cuda/launch.cuh"

namespace {

thread_local cudaError_t last_error = cudaSuccess;

// A launch may carry 4 KiB of arguments.
enum { kPointers = 480 };

struct Pointers {
  uint8_t** target;
  int count;
  uint8_t* pointer[kPointers];
};

__global__ void copy_pointers(Pointers p) {
  for (int i = threadIdx.x; i < p.count; i += kThreads) p.target[i] = p.pointer[i];
}

struct TileSums {
  const condu_chunk* chunk;
  Workspace space;
  double* sums;
};

__global__ void add_tiles_kernel(TileSums t) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= t.space.rows * t.space.chunks) return;
  const int64_t row = i / t.space.chunks;
  const condu_chunk chunk = t.chunk[i % t.space.chunks];
  const int64_t at = row * t.space.chunks + chunk.id;
  double total = t.space.tile_sums[at * CONDU_TILES];
  for (int tile = 1; tile * CONDU_TILE < chunk.elements; ++tile) {
    total = __dadd_rn(total, t.space.tile_sums[at * CONDU_TILES + tile]);
  }
  t.sums[at] = total;
}

}  // namespace

int condu_cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return CONDU_OK;
  last_error = error;
  cudaGetLastError();
  return CONDU_CUDA_FAILED;
}

int copy_planes(const condu_place* place, uint8_t** target, const uint8_t* const* planes,
                int64_t count) {
  for (int64_t first = 0; first < count; first += kPointers) {
    Pointers p = {target + first, (int)std::min<int64_t>(count - first, kPointers), {}};
    for (int i = 0; i < p.count; ++i) p.pointer[i] = const_cast<uint8_t*>(planes[first + i]);
    CONDU_TRY(launch(place, copy_pointers, 1, 0, p));
  }
  return CONDU_OK;
}

int add_tiles(const condu_place* place, const condu_work* work, const Workspace& space,
              double* sums) {
  const int64_t threads = space.rows * space.chunks;
  return launch(place, add_tiles_kernel, (threads + kThreads - 1) / kThreads, 0,
                TileSums{work->chunk, space, sums});
}

extern "C" {

int64_t condu_cuda_workspace(int64_t chunks, int64_t rows, int64_t planes) {
  return (rows * chunks * CONDU_TILES + planes) * 8;
}

const char* condu_cuda_error(void) { return cudaGetErrorString(last_error); }

int condu_cuda_devices(void) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return devices;
  cudaGetLastError();  // not sticky for the next caller
  return 0;
}

}  // extern "C"
