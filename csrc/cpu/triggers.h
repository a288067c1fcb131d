// What an element needs to know of all old tasks: S = sum and X = max of the rescalers whose mask
// bit is set; and what becomes of their masks.
//
// S is added in groups of four tasks, in task order, then group by group. A group of four has
// sixteen cases, so its part of S and of X is looked up by the element's four bits: instructions
// per task, not memory, are what this pass is short of.
#pragma once
#include "cpu/sums.h"

namespace condu {
namespace {

// A group's two tables of sixteen: sums, then maxima.
enum { kTables = 2 * 16 };

CONDU_INLINE int groups_of(int tasks) { return (tasks + 3) / 4; }

static void fill_tables(Triggers old, float* tables) {
  for (int first = 0; first < old.tasks; first += 4, tables += kTables) {
    for (int bits = 0; bits < 16; ++bits) {
      float sum = 0, largest = 0;
      for (int t = first; t < first + 4 && t < old.tasks; ++t) {
        const float rescaler = bits >> (t - first) & 1 ? old.rescaler[t] : 0;
        sum += rescaler;
        largest = rescaler > largest ? rescaler : largest;
      }
      tables[bits] = sum;
      tables[16 + bits] = largest;
    }
  }
}

CONDU_INLINE void gather(Triggers old, const float* tables, int64_t byte, Lanes* S, Lanes* X) {
  for (int v = 0; v < kVectors; ++v) S[v] = X[v] = splat(0.0f);
  for (int first = 0; first < old.tasks; first += 8) {
    alignas(64) uint8_t pattern[kStep];
    const int count = old.tasks - first;
    transpose_bits(old.planes + first, count < 8 ? count : 8, byte, pattern);
    const float* low = tables + first / 4 * kTables;
    for (int v = 0; v < kVectors; ++v) {
      const Index i = load_index(pattern + kLanes * v);
      S[v] = S[v] + lookup(low, i);
      X[v] = max_of(X[v], lookup(low + 16, i));
      if (count <= 4) continue;
      const Index j = next_four(i);
      S[v] = S[v] + lookup(low + kTables, j);
      X[v] = max_of(X[v], lookup(low + kTables + 16, j));
    }
  }
}

// den' += M'·|u'| for every old task. `size` is |u'| where the old tasks' side was kept and +0
// elsewhere, so the old bits select the right terms.
CONDU_INLINE void add_old(Triggers old, int64_t byte, int64_t row, int s, const Lanes* size,
                          Workspace work) {
  for (int t = 0; t < old.tasks; ++t) {
    add_step_where(work, row + t, s, old.planes[t] + byte, size);
  }
}

// M' = M & keep for a block. A lost bit never comes back.
CONDU_INLINE void keep_bits(Triggers old, int64_t byte, const uint8_t* kept, uint8_t* const* planes,
                            bool past_cache) {
  for (int t = 0; t < old.tasks; ++t) {
    store_common(planes[t] + byte, old.planes[t] + byte, kept, past_cache);
  }
}

CONDU_INLINE void prefetch_planes(Triggers old, int64_t byte) {
  for (int t = 0; t < old.tasks; ++t) __builtin_prefetch(old.planes[t] + byte + 3 * kLine);
}

}  // namespace
}  // namespace condu
