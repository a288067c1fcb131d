// Sums over a chunk, in one order on every instruction set.
//
// A step has 64 elements in four vectors of sixteen lanes. In fp32, lane l of a step adds
// (l + (l + 16)) + ((l + 32) + (l + 48)), and the sums of a block's eight steps are added as
// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)): a tree of five levels over 32 terms, so at most five
// roundings, and none where all terms are equal. Each lane is then added to an fp64 sum; at the end
// of a chunk the sixteen fp64 sums are added in lane order.
#pragma once
#include <string.h>

#include "cpu/kernels.h"

namespace condu {
namespace {

// Row r's sums of step s.
CONDU_INLINE float* step_sums(Workspace work, int64_t row, int s) {
  return work.steps + (row * kSteps + s) * kLanes;
}

CONDU_INLINE void add_step(Workspace work, int64_t row, int s, const Lanes* terms) {
  store_f32(step_sums(work, row, s), (terms[0] + terms[1]) + (terms[2] + terms[3]));
}

// The same for the terms whose mask is set.
CONDU_INLINE void add_step_where(Workspace work, int64_t row, int s, const Mask* masks,
                                 const Lanes* terms) {
  const Lanes low = add_where(keep(masks[0], terms[0]), masks[1], terms[1]);
  const Lanes high = add_where(keep(masks[2], terms[2]), masks[3], terms[3]);
  store_f32(step_sums(work, row, s), low + high);
}

// A step's masks from its eight bytes of a plane.
struct StepMasks {
  Mask of[kVectors];
};
CONDU_INLINE StepMasks load_masks(const uint8_t* bits) {
  return {{load_mask(bits), load_mask(bits + 2), load_mask(bits + 4), load_mask(bits + 6)}};
}

CONDU_INLINE void end_block(Workspace work, int first, int last) {
  for (int r = first; r < last; ++r) {
    const float* sums = step_sums(work, r, 0);
    const Lanes low =
        (load_f32(sums) + load_f32(sums + 16)) + (load_f32(sums + 32) + load_f32(sums + 48));
    const Lanes high =
        (load_f32(sums + 64) + load_f32(sums + 80)) + (load_f32(sums + 96) + load_f32(sums + 112));
    add_to_double(work.lanes + r * kLanes, low + high);
  }
}

CONDU_INLINE void start_chunk(Workspace work, int rows) {
  memset(work.lanes, 0, sizeof(double) * kLanes * rows);
}

CONDU_INLINE void end_chunk(Workspace work, int first, int last) {
  for (int r = first; r < last; ++r) {
    double total = 0;
    for (int l = 0; l < kLanes; ++l) total += work.lanes[kLanes * r + l];
    work.total[r] = total;
  }
}

}  // namespace
}  // namespace condu
