// What the driver (driver.cpp) and the instruction sets (isa_*.cpp) agree on: one chunk of work.
//
// Only plain structs here: an instruction set's file must not instantiate anything that the linker
// could share with code for older processors.
#pragma once
#include <stdint.h>

#include "condu_ext.h"

namespace condu {

enum {
  kLanes = 16,
  kVectors = 4,
  kStep = kLanes * kVectors,  // elements taken at once
  kBlock = CONDU_ALIGN,       // elements of a cache line of mask bits
  kSteps = kBlock / kStep,    // steps of a block
  kLine = kBlock / 8,         // bytes of a cache line
};

// Bytes of an element. Internal, like every function here: see above.
static inline int size_of(uint8_t dtype) {
  return dtype == CONDU_F32 || dtype == CONDU_F32_VIA_BF16 || dtype == CONDU_F32_VIA_F16 ? 4 : 2;
}

// Loops over vectors become straight code: left as loops they index arrays of vectors in memory.
#define CONDU_UNROLL _Pragma("GCC unroll 4")

// One contiguous tensor, from the chunk's first element on.
struct Stream {
  const void* data;  // null: absent (a base of zeros)
  uint8_t dtype;
};

// The old tasks at a chunk. Planes are whole planes; `byte` is where the chunk starts in them.
struct Triggers {
  const uint8_t* const* planes;
  const float* rescaler;  // [tasks], of this tensor
  int32_t tasks;
};

// A thread's memory while it works on chunks; every part starts on a cache line.
struct Workspace {
  float* steps;    // [rows][kSteps][kLanes]: sums of the present block's steps
  double* lanes;   // [rows][kLanes]: sums of the chunk
  double* total;   // [rows]: result, written at a chunk's end
  float* tables;   // [groups of four old tasks][2][16]: see triggers.h
  void* turned;    // [eights of old tasks][kBlock]: mask bits as an instruction set wants them
  uint8_t* lines;  // [tasks][kLine]: mask bits of the present block
  char* padded;    // [models + 1][kStep * 4]: last elements of tensors, followed by zeros
  Stream* ends;    // [models]: where they are
};

struct UnifyChunk {
  int64_t elements, byte;
  int32_t tasks;
  const Stream* models;  // [tasks]
  Stream base;
  int32_t zero_sum;
  bool past_cache;  // store what will not be read again soon past the caches
  void* u;
  uint8_t* const* planes;
  Workspace work;  // rows: num of every task, then den of every task
};

struct AbsorbChunk {
  int64_t elements, byte;
  Triggers old;
  const void* old_u;
  Stream model, base;
  int32_t zero_sum;
  bool past_cache;
  void* u;
  uint8_t* const* planes;
  Workspace work;  // rows: den of the old tasks, den of the new one, num of the new one
};

struct MergeChunk {
  int64_t elements, byte;
  Triggers a, b;
  const void *a_u, *b_u;
  int32_t zero_sum;
  bool past_cache;
  void* u;
  uint8_t* const* planes;
  Workspace work;  // rows: den of a's tasks, then of b's
};

struct DecoupleChunk {
  int64_t elements;
  const void* u;
  const uint8_t* plane;  // at the chunk
  float rescaler;
  Stream base;
  bool past_cache;
  void* out;
  uint8_t out_dtype;
};

struct MeasureChunk {
  int64_t elements;
  Stream model, base;
  Workspace work;  // row: num
};

// `kind` is the dtype that every stream of the chunk shares, or kMixed.
enum { kMixed = 3, kKinds = 4 };

struct Kernels {
  const char* name;
  // [kind][state is bf16]
  void (*unify[kKinds][2])(const UnifyChunk&);
  void (*absorb[kKinds][2])(const AbsorbChunk&);
  void (*decouple[kKinds][2])(const DecoupleChunk&);
  void (*merge[2])(const MergeChunk&);
  void (*measure)(const MeasureChunk&);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// The kernels in use; null if CONDU_CPU_ISA names an unknown or missing instruction set.
const Kernels* kernels();

}  // namespace condu
