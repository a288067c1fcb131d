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

// A group's two tables of sixteen, sums and maxima, laid out as the instruction set wants them.
enum { kTables = 2 * 16 };

static void fill_tables(Triggers old, float* tables) {
  for (int first = 0; first < old.tasks; first += 4, tables += kTables) {
    for (int bits = 0; bits < 16; ++bits) {
      float sum = 0, largest = 0;
      for (int t = first; t < first + 4 && t < old.tasks; ++t) {
        const float rescaler = bits >> (t - first) & 1 ? old.rescaler[t] : 0;
        sum += rescaler;
        largest = rescaler > largest ? rescaler : largest;
      }
      tables[place_of_sum(bits)] = sum;
      tables[place_of_maximum(bits)] = largest;
    }
  }
}

// A block's mask lines, and turned for `gather`. They are copied first: large planes start at the
// same place of a page, so at any time all their lines compete for one set of the first-level
// cache, and a line should be read from there once.
CONDU_INLINE void load_block(Triggers old, int64_t byte, uint8_t* lines, Turned* turned) {
  for (int t = 0; t < old.tasks; ++t) store_line(lines + t * kLine, old.planes[t] + byte, false);
  for (int first = 0; first < old.tasks; first += 8) *turned++ = turn_lines(lines + first * kLine);
}

template <bool kFirst>
CONDU_INLINE void gather_eight(const Turned* turned, int tasks, const float* tables, int s,
                               Lanes* S, Lanes* X) {
  const Pattern pattern = load_pattern(turned, s);
  Lanes sum, largest;
  CONDU_UNROLL for (int v = 0; v < kVectors; ++v) {
    look_up(tables, pattern, v, 0, &sum, &largest);
    S[v] = kFirst ? sum : S[v] + sum;
    X[v] = kFirst ? largest : max_of(X[v], largest);
  }
  if (tasks <= 4) return;
  CONDU_UNROLL for (int v = 0; v < kVectors; ++v) {
    look_up(tables + kTables, pattern, v, 1, &sum, &largest);
    S[v] = S[v] + sum;
    X[v] = max_of(X[v], largest);
  }
}

CONDU_INLINE void gather(const Turned* turned, int tasks, const float* tables, int s, Lanes* S,
                         Lanes* X) {
  if (!tasks) {
    CONDU_UNROLL for (int v = 0; v < kVectors; ++v) S[v] = X[v] = splat(0.0f);
    return;
  }
  gather_eight<true>(turned, tasks, tables, s, S, X);
  for (int first = 8; first < tasks; first += 8) {
    gather_eight<false>(++turned, tasks - first, tables += 2 * kTables, s, S, X);
  }
}

// How many of the tasks, from the first on, are summed by sixteens: none, unless an instruction set
// has its own way (sixteens_avx512.h), which gives the same sums in another layout.
#ifndef CONDU_SIXTEENS
CONDU_INLINE int in_sixteens(int) { return 0; }
CONDU_INLINE void add_sixteens(const Turned*, int, int64_t, int, const Lanes*, Workspace) {}
CONDU_INLINE void end_block_sixteens(Workspace, int, int) {}
CONDU_INLINE void end_chunk_sixteens(Workspace, int, int) {}
#endif

// den' += M'·|u'| for every old task; their sums are rows `row` and following. `size` is |u'| where
// the old tasks' side was kept and +0 elsewhere, so the old bits select the right terms.
CONDU_INLINE void add_old(int tasks, const uint8_t* lines, const Turned* turned, int64_t row, int s,
                          const Lanes* size, Workspace work) {
  const int first = in_sixteens(tasks);
  if (first) add_sixteens(turned, first, row, s, size, work);
  for (int t = first; t < tasks; ++t) {
    add_step_where(work, row + t, s, load_masks(lines + t * kLine + s * (kStep / 8)).of, size);
  }
}

CONDU_INLINE void end_block_old(Workspace work, int first, int last) {
  const int turned = first + in_sixteens(last - first);
  end_block_sixteens(work, first, turned);
  end_block(work, turned, last);
}

CONDU_INLINE void end_chunk_old(Workspace work, int first, int last) {
  const int turned = first + in_sixteens(last - first);
  end_chunk_sixteens(work, first, turned);
  end_chunk(work, turned, last);
}

// M' = M & keep for a block. A lost bit never comes back.
CONDU_INLINE void keep_bits(int tasks, const uint8_t* lines, const uint8_t* kept, int64_t byte,
                            uint8_t* const* planes, bool past_cache) {
  for (int t = 0; t < tasks; ++t) {
    store_common(planes[t] + byte, lines + t * kLine, kept, past_cache);
  }
}

CONDU_INLINE void prefetch_planes(Triggers old, int64_t byte) {
  for (int t = 0; t < old.tasks; ++t) __builtin_prefetch(old.planes[t] + byte + 3 * kLine);
}

}  // namespace
}  // namespace condu
