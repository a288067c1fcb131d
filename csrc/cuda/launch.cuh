// Launching, and what the blocks of every kernel do first: find their tile and copy pointers.
#pragma once
#include <cuda_runtime.h>

#include "cuda/octets.cuh"

// The first launch or check that fails is the answer.
#define CONDU_TRY(status) \
  if (const int failed = (status)) return failed

// Keeps what CUDA said for condu_cuda_error and turns it into a status. CUDA itself forgets it: an
// error that stayed would be taken for the next launch's.
int condu_cuda_status(cudaError_t error);

// The device of a call is current while in scope. A device that already is current is left alone,
// for setting one makes a context on it.
class OnDevice {
 public:
  explicit OnDevice(int device) : here_(device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != here_) error = cudaSetDevice(here_);
  }
  ~OnDevice() {
    if (before_ != here_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error;

 private:
  int here_, before_ = 0;
};

template <class Arguments>
int launch(const condu_place* place, void (*kernel)(Arguments), int64_t blocks, size_t shared,
           Arguments arguments) {
  if (!blocks) return CONDU_OK;
  if (blocks > INT32_MAX) return CONDU_BAD_ARGUMENT;
  if (shared > 48 * 1024) {  // more than what every kernel may have
    int most = 0;
    CONDU_TRY(condu_cuda_status(
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, place->device)));
    if (shared > (size_t)most) return CONDU_TOO_MANY_TASKS;
    // The limit belongs to the kernel, not to this launch: always the same value, or a launch of
    // another thread could find it lowered.
    CONDU_TRY(condu_cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)));
  }
  void* list[] = {&arguments};
  return condu_cuda_status(cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3(kThreads), list,
                                            shared, (cudaStream_t)place->stream));
}

// ---- tables ------------------------------------------------------------------------------------

// The part of a condu_work that one launch, for chunks of one kind, covers.
struct Work {
  const condu_chunk* chunk;
  int64_t tensors;
  const void* const* data;
  const uint8_t* dtype;
};

inline int64_t chunks_of(const condu_work* work) {
  int64_t chunks = 0;
  for (int kind = 0; kind < CONDU_KINDS; ++kind) chunks += work->of_kind[kind];
  return chunks;
}

// Calls run(kind, blocks, part of the work) for every kind that is there.
template <class Run>
int for_kinds(const condu_work* work, Run run) {
  const condu_chunk* first = work->chunk;
  for (int kind = 0; kind < CONDU_KINDS; ++kind) {
    const int64_t chunks = work->of_kind[kind];
    if (chunks) {
      CONDU_TRY(
          run(kind, chunks * CONDU_TILES, Work{first, work->tensors, work->data, work->dtype}));
    }
    first += chunks;
  }
  return CONDU_OK;
}

// A block's shared memory, all of it: what is where is each kernel's matter.
extern __shared__ __align__(16) unsigned char shared_memory[];

// What a block works on.
struct Tile {
  condu_chunk chunk;
  int number, first;  // tile of the chunk, and its first element
  int padded;         // elements of the chunk with its padding
  __device__ __forceinline__ explicit Tile(const Work& work) {
    chunk = work.chunk[blockIdx.x / CONDU_TILES];
    number = blockIdx.x % CONDU_TILES;
    first = number * CONDU_TILE;
    padded = (chunk.elements + CONDU_ALIGN - 1) / CONDU_ALIGN * CONDU_ALIGN;
  }
  __device__ __forceinline__ bool empty() const { return first >= chunk.elements; }
  // First element of the calling warp's run number k, in the chunk.
  __device__ __forceinline__ int run(int k) const {
    return first + kRun * (kWarps * k + (int)threadIdx.x / 32);
  }
};

CONDU_DEVICE Stream stream_of(const Work& work, int64_t model, const condu_chunk& chunk) {
  const int64_t at = model * work.tensors + chunk.tensor;
  const uint8_t dtype = work.dtype[at];
  return {(const char*)work.data[at] + chunk.start * (is_four_bytes(dtype) ? 4 : 2), dtype};
}

// A base model, or a null stream.
CONDU_DEVICE Stream base_of(const Work& work, int64_t model, int has_base,
                            const condu_chunk& chunk) {
  return has_base ? stream_of(work, model, chunk) : Stream{nullptr, CONDU_F32};
}

// ---- workspace ---------------------------------------------------------------------------------

// A call's workspace: sums of tiles, then pointers to planes.
struct Workspace {
  Workspace(const condu_place* place, int64_t chunks, int64_t rows)
      : chunks(chunks),
        rows(rows),
        tile_sums((double*)place->workspace),
        planes((uint8_t**)(tile_sums + rows * chunks * CONDU_TILES)) {}
  int64_t chunks, rows;
  double* tile_sums;  // [rows][chunks][CONDU_TILES]
  uint8_t** planes;
};

// Puts pointers to planes behind one another in the workspace, through kernel arguments.
int copy_planes(const condu_place* place, uint8_t** target, const uint8_t* const* planes,
                int64_t count);

// Adds the tiles of every chunk in order: sums[rows][chunks].
int add_tiles(const condu_place* place, const condu_work* work, const Workspace& space,
              double* sums);
