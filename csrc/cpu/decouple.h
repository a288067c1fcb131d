// Decouple: one task's expert from the unified delta. Measure: how far a model moved.
#pragma once
#include "cpu/streams.h"
#include "cpu/sums.h"

namespace condu {
namespace {

// Elements per turn: enough loads under way, and a prefetch for each cache line.
template <int kKind, bool kBf16>
CONDU_INLINE void decouple_vectors(const DecoupleChunk& c, Stream base, void* out, int64_t i,
                                   int64_t at, bool past_cache) {
  const Lanes rescaler = splat(c.rescaler);
  CONDU_UNROLL for (int v = 0; v < kVectors; ++v) {
    const int64_t e = at + kLanes * v;
    const Lanes start = base.data ? load<kKind>(base, e) : splat(0.0f);
    const Lanes moved = start + rescaler * load_unified<kBf16>(c.u, i + kLanes * v);
    const Mask mine = load_mask(c.plane + i / 8 + 2 * v);
    store<kKind>(out, c.out_dtype, e, choose(mine, moved, start), past_cache);
  }
}

template <int kKind, bool kBf16>
void decouple_chunk(const DecoupleChunk& c) {
  int64_t i = 0;
  for (; i + kStep <= c.elements; i += kStep) {
    prefetch<kKind>(c.base, i, kFar);
    prefetch_unified<kBf16>(c.u, i);
    decouple_vectors<kKind, kBf16>(c, c.base, c.out, i, i, c.past_cache);
  }
  if (i == c.elements) return;
  alignas(64) char start[kStep * 4], end[kStep * 4];
  const Stream base = pad(c.base, i, c.elements, start);
  decouple_vectors<kKind, kBf16>(c, base, end, i, 0, false);
  const int size = size_of(c.out_dtype);
  memcpy((char*)c.out + i * size, end, (size_t)(c.elements - i) * size);
}

void measure_chunk(const MeasureChunk& c) {
  start_chunk(c.work, 1);
  for (int64_t block = 0; block < c.elements; block += kBlock) {
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = block + s * kStep;
      const bool whole = i + kStep <= c.elements;
      const Stream model = whole ? c.model : pad(c.model, i, c.elements, c.work.padded);
      const Stream base = whole ? c.base : pad(c.base, i, c.elements, c.work.padded + 4 * kStep);
      Lanes moved[kVectors];
      CONDU_UNROLL for (int v = 0; v < kVectors; ++v) {
        moved[v] = magnitude(load_delta<kMixed>(model, base, (whole ? i : 0) + kLanes * v));
      }
      add_step(c.work, 0, s, moved);
    }
    end_block(c.work, 0, 1);
  }
  end_chunk(c.work, 0, 1);
}

}  // namespace
}  // namespace condu
