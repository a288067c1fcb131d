// C interface of the fusion kernels: raw pointers, 64-bit sizes, a status. No torch, no Python.
//
// An *arena* holds the unified delta of many tensors, one after another. Tensor k occupies
// elements [offset[k], offset[k] + numel[k]) and is padded to a multiple of CONDU_ALIGN elements;
// the kernels write the padding as zeros. A *plane* is one task's mask over an arena: bit j of the
// plane (natural little-endian bit order) belongs to element j, so every tensor starts on a byte
// and, with CONDU_ALIGN = 512, on a cache line.
//
// A *chunk* is CONDU_CHUNK consecutive elements of one tensor; the last chunk of a tensor may be
// shorter. Chunks are numbered tensor by tensor. Sums are returned per chunk, so that whoever
// splits a model at chunk borders adds the same numbers in the same order.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { CONDU_ALIGN = 512, CONDU_CHUNK = 65536 };

// Storage of a tensor. The VIA kinds are rounded through a narrower type when they are loaded: a
// base model that is compared with fine-tuned models of less precision (match_dtype).
enum condu_dtype {
  CONDU_F32 = 0,
  CONDU_BF16 = 1,
  CONDU_F16 = 2,
  CONDU_F32_VIA_BF16 = 3,
  CONDU_F32_VIA_F16 = 4,
  CONDU_BF16_VIA_F16 = 5,
  CONDU_F16_VIA_BF16 = 6,
};

// What total == 0 elects (FusionRule.zero_sum).
enum condu_zero_sum { CONDU_NEGATIVE = 0, CONDU_POSITIVE = 1, CONDU_ZERO = 2 };

enum condu_status {
  CONDU_OK = 0,
  CONDU_NULL_POINTER = 1,
  CONDU_BAD_ARGUMENT = 2,
  CONDU_NO_MEMORY = 3,
  CONDU_CUDA_FAILED = 4,
  CONDU_TOO_MANY_TASKS = 5,  // for the shared memory of this GPU
};

struct condu_layout {
  int64_t tensors;
  const int64_t* numel;   // [tensors]
  const int64_t* offset;  // [tensors], multiples of CONDU_ALIGN
};

// One model: its tensors, anywhere in memory, each contiguous.
struct condu_model {
  const void* const* data;  // [tensors]
  const uint8_t* dtype;     // [tensors], condu_dtype
};

struct condu_state {
  const void* u;  // arena
  uint8_t dtype;  // CONDU_F32 or CONDU_BF16
  int32_t tasks;
  const uint8_t* const* planes;  // [tasks]
  const float* rescaler;         // [tasks][tensors]
};

// Where a new state goes. For unify and merge all tasks; for absorb the old tasks, then the new.
struct condu_output {
  void* u;
  uint8_t dtype;
  uint8_t* const* planes;  // [tasks]
  double* num;             // [tasks][chunks]: sum of |d|; nullptr where the inputs give it
  double* den;             // [tasks][chunks]: sum of M*|u|, of u as stored
};

int64_t condu_chunks(const condu_layout* layout);

// Unify: `base` may be null, then the models already are deltas.
int condu_unify(const condu_layout* layout, int32_t tasks, const condu_model* models,
                const condu_model* base, int zero_sum, const condu_output* out, int threads);

// Absorb: decouple every task of `old` and unify them with one more model, in one pass and without
// writing a decoupled delta. out->u and out->planes[0 .. old->tasks) may be those of `old`.
// out->num is [chunks], the new task's only.
int condu_absorb(const condu_layout* layout, const condu_state* old, const condu_model* model,
                 const condu_model* base, int zero_sum, const condu_output* out, int threads);

// Merge: the same with a second state in place of a model. out->num is not used.
int condu_merge(const condu_layout* layout, const condu_state* a, const condu_state* b,
                int zero_sum, const condu_output* out, int threads);

// Decouple the only task of `expert`: out = base + rescaler * (mask, u). With a null base the
// decoupled delta itself is written.
int condu_decouple(const condu_layout* layout, const condu_state* expert, const condu_model* base,
                   void* const* out, const uint8_t* out_dtype, int threads);

// Sum of |model - base| per chunk: num[chunks]. What absorb would find, without writing anything.
int condu_measure(const condu_layout* layout, const condu_model* model, const condu_model* base,
                  double* num, int threads);

// Copies with stores past the caches, from all threads: what a kernel's bandwidth is compared with.
int condu_copy(void* to, const void* from, int64_t bytes, int threads);

// Adds rows of chunk sums in chunk order: sums[rows][tensors] from chunk_sums[rows][chunks].
void condu_add_chunks(const condu_layout* layout, int64_t rows, const double* chunk_sums,
                      double* sums);

// Name of the instruction set in use: "avx512", "avx2" or "baseline". Chosen at first use; the
// environment variable CONDU_CPU_ISA forces one. Null if that names an unknown or missing one.
const char* condu_cpu_isa(void);

#ifdef __cplusplus
}
#endif
