// Sums over a chunk, in one order on every instruction set.
//
// A step has 64 elements in four vectors of sixteen lanes. In fp32, lane l of a step adds
// (l + (l + 16)) + ((l + 32) + (l + 48)), and the sums s of four steps are added as
// (s0 + s1) + (s2 + s3): a tree of four levels over sixteen terms, so at most four roundings a
// term, and none where all terms are equal. Each lane is then added to an fp64 sum; at the end of a
// chunk the sixteen fp64 sums are added in lane order.
#pragma once
#include <string.h>

#include "cpu/kernels.h"

namespace condu {
namespace {

// Terms of row r in step s of a block.
CONDU_INLINE void add_step(Workspace work, int64_t row, int s, const Lanes* terms) {
  float* at = work.steps + (row * kSummed + s % kSummed) * kLanes;
  store_f32(at, (terms[0] + terms[1]) + (terms[2] + terms[3]));
}

// The same for the terms whose bit is set; `bits` are the step's eight bytes.
CONDU_INLINE void add_step_where(Workspace work, int64_t row, int s, const uint8_t* bits,
                                 const Lanes* terms) {
  const Lanes low = add_where(keep(load_mask(bits), terms[0]), load_mask(bits + 2), terms[1]);
  const Lanes high = add_where(keep(load_mask(bits + 4), terms[2]), load_mask(bits + 6), terms[3]);
  store_f32(work.steps + (row * kSummed + s % kSummed) * kLanes, low + high);
}

// To be called after every step: every fourth one ends the sums in fp32.
CONDU_INLINE void end_step(Workspace work, int rows, int s) {
  if (s % kSummed != kSummed - 1) return;
  for (int r = 0; r < rows; ++r) {
    const float* sums = work.steps + r * kSummed * kLanes;
    const Lanes low = load_f32(sums) + load_f32(sums + kLanes);
    const Lanes high = load_f32(sums + 2 * kLanes) + load_f32(sums + 3 * kLanes);
    add_to_double(work.lanes + r * kLanes, low + high);
  }
}

CONDU_INLINE void start_chunk(Workspace work, int rows) {
  memset(work.lanes, 0, sizeof(double) * kLanes * rows);
}

CONDU_INLINE void end_chunk(Workspace work, int rows) {
  for (int r = 0; r < rows; ++r) {
    double total = 0;
    for (int l = 0; l < kLanes; ++l) total += work.lanes[kLanes * r + l];
    work.total[r] = total;
  }
}

}  // namespace
}  // namespace condu
