// C interface of the CUDA kernels. Arenas, planes, chunks and sums are those of condu_ext.h; every
// pointer to data is a device pointer, and nothing here synchronises or allocates.
//
// The tensors of a model are found through a table on the device (condu_work), which depends on
// addresses and sizes alone and can be used again while they stay. Everything that changes from
// call to call travels in kernel arguments, so a captured CUDA graph replays without the host.
#pragma once
#include "condu_ext.h"

#ifdef __cplusplus
extern "C" {
#endif

// A *tile* is what one thread block takes: CONDU_TILE elements of a chunk.
enum { CONDU_TILE = 8192, CONDU_TILES = CONDU_CHUNK / CONDU_TILE };

// What a chunk's tensors have in common. The first three hold plain tensors of one dtype that lie
// on 16-byte boundaries and fill whole groups of eight elements; all others are general.
enum condu_kind {
  CONDU_ALL_F32 = 0,
  CONDU_ALL_BF16 = 1,
  CONDU_ALL_F16 = 2,
  CONDU_GENERAL = 3,
  CONDU_KINDS = 4,
};

struct condu_chunk {
  int64_t start;  // first element, in its tensor
  int64_t arena;  // first element, in the arena
  int64_t id;     // column of the chunk sums
  int32_t tensor;
  int32_t elements;
};

struct condu_work {
  int64_t tensors;
  int64_t of_kind[CONDU_KINDS];     // number of chunks of each kind
  const struct condu_chunk* chunk;  // [chunks], sorted by kind
  const void* const* data;          // [models][tensors]
  const uint8_t* dtype;             // [models][tensors], condu_dtype
};

struct condu_place {
  int32_t device;
  void* stream;     // cudaStream_t
  void* workspace;  // condu_cuda_workspace() bytes, in use until the stream has passed the call
};

// Bytes of workspace for a call with so many rows of sums and so many planes, read or written.
int64_t condu_cuda_workspace(int64_t chunks, int64_t rows, int64_t planes);

// `sums` is [rows][chunks] of the layout, rows as listed. Base models come last in work->data.

// Rows: num of every task, den of every task.
int condu_cuda_unify(const struct condu_place* place, const struct condu_work* work, int32_t tasks,
                     int has_base, int zero_sum, void* u, uint8_t dtype, uint8_t* const* planes,
                     double* sums);

// Rows: den of the old tasks, den of the new one, num of the new one. In place if u and planes are
// those of `old`. The arrays of pointers are on the host, what they point to on the device.
int condu_cuda_absorb(const struct condu_place* place, const struct condu_work* work,
                      const struct condu_state* old, int has_base, int zero_sum, void* u,
                      uint8_t* const* planes, double* sums);

// Rows: den of a's tasks, then of b's. The work lists no models.
int condu_cuda_merge(const struct condu_place* place, const struct condu_work* work,
                     const struct condu_state* a, const struct condu_state* b, int zero_sum,
                     void* u, uint8_t* const* planes, double* sums);

// The models of the work are the tensors to write, then the base.
int condu_cuda_decouple(const struct condu_place* place, const struct condu_work* work,
                        const struct condu_state* expert, int has_base);

// Rows: num.
int condu_cuda_measure(const struct condu_place* place, const struct condu_work* work, int has_base,
                       double* sums);

// Number of CUDA devices; 0 without a driver.
int condu_cuda_devices(void);

// What CUDA said of this thread's last call that gave CONDU_CUDA_FAILED.
const char* condu_cuda_error(void);

#ifdef __cplusplus
}
#endif
