// Absorb and merge: decouple every old task and unify again, without writing a decoupled delta.
//
// One loop over blocks of 512 elements, a cache line of each mask plane; inside, steps of 64. The
// new mask lines are stored when a block is done, so in place no old bit is lost before its use.
#pragma once
#include "cpu/streams.h"
#include "cpu/triggers.h"
#include "election.h"

namespace condu {
namespace {

CONDU_INLINE int64_t step_byte(int s) { return s * (kStep / 8); }

template <int kKind, bool kBf16, bool kZero>
CONDU_INLINE void absorb_blocks(const AbsorbChunk& chunk) {
  const AbsorbChunk c = chunk;  // a copy: the compiler cannot know that no store changes it
  const Workspace work = c.work;
  const int T = c.old.tasks;
  const Lanes tie = splat(tie_for(c.zero_sum == CONDU_NEGATIVE));
  uint8_t *joined = work.lines, *kept = joined + kLine, *lines = kept + kLine;
  Turned* turned = (Turned*)work.turned;
  fill_tables(c.old, work.tables);
  memset(lines, 0, (T + 7) / 8 * 8 * kLine);  // no task: no bits
  start_chunk(work, T + 2);
  for (int64_t block = 0; block < c.elements; block += kBlock) {
    const int64_t line = c.byte + block / 8;
    prefetch_planes(c.old, line);
    load_block(c.old, line, lines, turned);
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = block + s * kStep;
      const bool whole = i + kStep <= c.elements;
      const Stream model = whole ? c.model : pad(c.model, i, c.elements, work.padded);
      const Stream base = whole ? c.base : pad(c.base, i, c.elements, work.padded + 4 * kStep);
      const int64_t at = whole ? i : 0;
      prefetch<kKind>(c.model, i, kFar);
      prefetch<kKind>(c.base, i, kFar);
      prefetch_unified<kBf16>(c.old_u, i);

      Lanes S[kVectors], X[kVectors], moved[kVectors], stored[kVectors], size[kVectors];
      Mask joins[kVectors];
      gather(turned, T, work.tables, s, S, X);
      CONDU_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Lanes u = load_unified<kBf16>(c.old_u, i + kLanes * v);
        const Lanes d = load_delta<kKind>(model, base, at + kLanes * v);
        const Flag<Lanes, Mask> flag = elect(u * S[v] + d, tie);
        const Lanes old = agreeing<kZero>(u, flag), agreed = agreeing<kZero>(d, flag);
        const Mask keeps = above_zero(old);
        joins[v] = above_zero(agreed);
        store_mask(kept + step_byte(s) + 2 * v, keeps);
        store_mask(joined + step_byte(s) + 2 * v, joins[v]);
        const Lanes best = max_of(agreed, max_of(old * X[v], splat(0.0f)));
        const Lanes value = elected(best, flag);
        stored[v] = store_unified<kBf16>(c.u, i + kLanes * v, value, best, c.past_cache);
        moved[v] = magnitude(d);
        size[v] = keep(keeps, stored[v]);
      }
      add_old(T, lines, turned, 0, s, size, work);
      add_step_where(work, T, s, joins, stored);
      add_step(work, T + 1, s, moved);
    }
    end_block_old(work, 0, T);
    end_block(work, T, T + 2);
    keep_bits(T, lines, kept, line, c.planes, c.past_cache);
    store_line(c.planes[T] + line, joined, c.past_cache);
  }
  end_chunk_old(work, 0, T);
  end_chunk(work, T, T + 2);
}

template <int kKind, bool kBf16>
void absorb_chunk(const AbsorbChunk& c) {
  c.zero_sum == CONDU_ZERO ? absorb_blocks<kKind, kBf16, true>(c)
                           : absorb_blocks<kKind, kBf16, false>(c);
}

template <bool kBf16, bool kZero>
CONDU_INLINE void merge_blocks(const MergeChunk& chunk) {
  const MergeChunk c = chunk;  // as above
  const Workspace work = c.work;
  const int rows = c.a.tasks + c.b.tasks;
  const Lanes tie = splat(tie_for(c.zero_sum == CONDU_NEGATIVE));
  uint8_t *kept_a = work.lines, *lines_a = kept_a + kLine;
  uint8_t *kept_b = lines_a + (c.a.tasks + 7) / 8 * 8 * kLine, *lines_b = kept_b + kLine;
  float *tables_a = work.tables, *tables_b = tables_a + (c.a.tasks + 7) / 8 * 2 * kTables;
  Turned* turned_a = (Turned*)work.turned;
  Turned* turned_b = turned_a + (c.a.tasks + 7) / 8;
  fill_tables(c.a, tables_a);
  fill_tables(c.b, tables_b);
  memset(work.lines, 0, (size_t)(lines_b - work.lines) + (c.b.tasks + 7) / 8 * 8 * kLine);
  start_chunk(work, rows);
  for (int64_t block = 0; block < c.elements; block += kBlock) {
    const int64_t line = c.byte + block / 8;
    prefetch_planes(c.a, line);
    prefetch_planes(c.b, line);
    load_block(c.a, line, lines_a, turned_a);
    load_block(c.b, line, lines_b, turned_b);
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = block + s * kStep;
      prefetch_unified<kBf16>(c.a_u, i);
      prefetch_unified<kBf16>(c.b_u, i);
      Lanes Sa[kVectors], Xa[kVectors], Sb[kVectors], Xb[kVectors];
      Lanes size_a[kVectors], size_b[kVectors];
      gather(turned_a, c.a.tasks, tables_a, s, Sa, Xa);
      gather(turned_b, c.b.tasks, tables_b, s, Sb, Xb);
      CONDU_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Lanes ua = load_unified<kBf16>(c.a_u, i + kLanes * v);
        const Lanes ub = load_unified<kBf16>(c.b_u, i + kLanes * v);
        const Flag<Lanes, Mask> flag = elect(ua * Sa[v] + ub * Sb[v], tie);
        const Lanes a = agreeing<kZero>(ua, flag), b = agreeing<kZero>(ub, flag);
        const Mask keeps_a = above_zero(a), keeps_b = above_zero(b);
        store_mask(kept_a + step_byte(s) + 2 * v, keeps_a);
        store_mask(kept_b + step_byte(s) + 2 * v, keeps_b);
        const Lanes best = max_of(b * Xb[v], max_of(a * Xa[v], splat(0.0f)));
        const Lanes value = elected(best, flag);
        const Lanes stored = store_unified<kBf16>(c.u, i + kLanes * v, value, best, c.past_cache);
        size_a[v] = keep(keeps_a, stored);
        size_b[v] = keep(keeps_b, stored);
      }
      add_old(c.a.tasks, lines_a, turned_a, 0, s, size_a, work);
      add_old(c.b.tasks, lines_b, turned_b, c.a.tasks, s, size_b, work);
    }
    end_block_old(work, 0, c.a.tasks);
    end_block_old(work, c.a.tasks, rows);
    keep_bits(c.a.tasks, lines_a, kept_a, line, c.planes, c.past_cache);
    keep_bits(c.b.tasks, lines_b, kept_b, line, c.planes + c.a.tasks, c.past_cache);
  }
  end_chunk_old(work, 0, c.a.tasks);
  end_chunk_old(work, c.a.tasks, rows);
}

template <bool kBf16>
void merge_chunk(const MergeChunk& c) {
  c.zero_sum == CONDU_ZERO ? merge_blocks<kBf16, true>(c) : merge_blocks<kBf16, false>(c);
}

}  // namespace
}  // namespace condu
