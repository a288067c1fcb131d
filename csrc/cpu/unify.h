// Unify: elect a sign, take the extreme value that agrees, all models at once.
//
// A step's tensors stay in the first-level cache, so going over the tasks twice (first the total,
// then who agrees) reads memory once. Mask bits of a block are collected and stored as cache lines.
#pragma once
#include "cpu/streams.h"
#include "cpu/sums.h"
#include "election.h"

namespace condu {
namespace {

CONDU_INLINE Lanes tie_lanes(int32_t zero_sum) {
  return splat(tie_for(zero_sum == CONDU_NEGATIVE));
}

// One step: `i` is where it starts in the chunk, `at` where it starts in the streams.
template <int kKind, bool kBf16, bool kZero>
CONDU_INLINE void unify_step(const UnifyChunk& c, const Stream* models, Stream base, int64_t i,
                             int64_t at, int s) {
  const Lanes tie = tie_lanes(c.zero_sum);
  Lanes best[kVectors], size[kVectors];
  Flag<Lanes, Mask> flag[kVectors];
  Lanes total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    total[v] = load_delta<kKind>(models[0], base, at + kLanes * v);
  }
  for (int t = 1; t < c.tasks; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      total[v] = total[v] + load_delta<kKind>(models[t], base, at + kLanes * v);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    flag[v] = elect(total[v], tie);
    best[v] = splat(0.0f);
  }
  for (int t = 0; t < c.tasks; ++t) {
    Lanes moved[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Lanes d = load_delta<kKind>(models[t], base, at + kLanes * v);
      const Lanes agreed = agreeing<kZero>(d, flag[v]);
      moved[v] = magnitude(d);
      best[v] = max_of(agreed, best[v]);
      store_mask(c.work.lines + t * kLine + s * (kStep / 8) + 2 * v, above_zero(agreed));
    }
    add_step(c.work, t, s, moved);
  }
  for (int v = 0; v < kVectors; ++v) {
    const Lanes value = elected(best[v], flag[v]);
    size[v] = store_unified<kBf16>(c.u, i + kLanes * v, value, best[v], c.past_cache);
  }
  for (int t = 0; t < c.tasks; ++t) {
    const StepMasks agreed = load_masks(c.work.lines + t * kLine + s * (kStep / 8));
    add_step_where(c.work, c.tasks + t, s, agreed.of, size);
  }
}

// A tensor's last elements, followed by zeros; returns the base's.
CONDU_RARE Stream pad_models(const UnifyChunk& c, int64_t i) {
  char* padded = c.work.padded;
  for (int t = 0; t < c.tasks; ++t, padded += kStep * 4) {
    c.work.ends[t] = pad(c.models[t], i, c.elements, padded);
  }
  return pad(c.base, i, c.elements, padded);
}

template <int kKind, bool kBf16, bool kZero>
CONDU_INLINE void unify_blocks(const UnifyChunk& chunk) {
  const UnifyChunk c = chunk;  // a copy: the compiler cannot know that no store changes it
  start_chunk(c.work, 2 * c.tasks);
  for (int64_t block = 0; block < c.elements; block += kBlock) {
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = block + s * kStep;
      const bool whole = i + kStep <= c.elements;
      for (int t = 0; t < c.tasks; ++t) prefetch<kKind>(c.models[t], i, kNear);
      prefetch<kKind>(c.base, i, kNear);
      const Stream base = whole ? c.base : pad_models(c, i);
      const Stream* models = whole ? c.models : c.work.ends;
      unify_step<kKind, kBf16, kZero>(c, models, base, i, whole ? i : 0, s);
    }
    end_block(c.work, 0, 2 * c.tasks);
    for (int t = 0; t < c.tasks; ++t) {
      store_line(c.planes[t] + c.byte + block / 8, c.work.lines + t * kLine, c.past_cache);
    }
  }
  end_chunk(c.work, 0, 2 * c.tasks);
}

template <int kKind, bool kBf16>
void unify_chunk(const UnifyChunk& c) {
  c.zero_sum == CONDU_ZERO ? unify_blocks<kKind, kBf16, true>(c)
                           : unify_blocks<kKind, kBf16, false>(c);
}

}  // namespace
}  // namespace condu
