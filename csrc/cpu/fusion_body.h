// The kernels, written once over sixteen fp32 lanes; each isa_*.cpp includes this after its lanes.
//
// Order of the sums, the same on every instruction set: in a step of 64 elements, lane l of sixteen
// adds its four terms in fp32 as (l + (l + 16)) + ((l + 32) + (l + 48)); then each lane is added to
// an fp64 sum; at the end of a chunk the sixteen fp64 sums are added in lane order.
//
// Elements are taken a step at a time and tasks one after another: a step's tensors stay in the
// first-level cache, so going over the tasks twice (first the total, then who agrees) reads memory
// once. A step's mask bits are re-read from the plane that they were just written to.
#pragma once
#include <string.h>

#include "cpu/kernels.h"
#include "election.h"

namespace condu {
namespace {

enum { kVectors = 4, kStep = 16 * kVectors };
typedef uint64_t StepBits;  // one mask bit for each element of a step

// Steps are lambdas that must become part of their loop.
#define CONDU_LAMBDA __attribute__((always_inline))
#define CONDU_RARE static __attribute__((noinline))

// ---- loading and storing -----------------------------------------------------------------------

CONDU_INLINE int size_of(uint8_t dtype) {
  return dtype == CONDU_F32 || dtype == CONDU_F32_VIA_BF16 || dtype == CONDU_F32_VIA_F16 ? 4 : 2;
}

CONDU_INLINE Lanes through_bf16(Lanes a) {
  uint16_t narrow[16];
  store_bf16(narrow, a);
  return load_bf16(narrow);
}

CONDU_INLINE Lanes through_f16(Lanes a) {
  uint16_t narrow[16];
  store_f16(narrow, a);
  return load_f16(narrow);
}

// Rounding through another type on the way; out of line, as it is rare and long.
CONDU_RARE Lanes load_through(Stream s, int64_t i) {
  const float* wide = (const float*)s.data + i;
  const uint16_t* narrow = (const uint16_t*)s.data + i;
  switch (s.dtype) {
    case CONDU_F32_VIA_BF16:
      return through_bf16(load_f32(wide));
    case CONDU_F32_VIA_F16:
      return through_f16(load_f32(wide));
    case CONDU_BF16_VIA_F16:
      return through_f16(load_bf16(narrow));
    default:
      return through_bf16(load_f16(narrow));
  }
}

template <int kKind>
CONDU_INLINE Lanes load(Stream s, int64_t i) {
  switch (kKind == kMixed ? s.dtype : kKind) {
    case CONDU_F32:
      return load_f32((const float*)s.data + i);
    case CONDU_BF16:
      return load_bf16((const uint16_t*)s.data + i);
    case CONDU_F16:
      return load_f16((const uint16_t*)s.data + i);
    default:
      return load_through(s, i);
  }
}

// The last vectors of a tensor: elements from `end` on are not read and count as zero.
CONDU_RARE Lanes load_until(Stream s, int64_t i, int64_t end) {
  if (i + 16 <= end) return load<kMixed>(s, i);
  alignas(64) char padded[64] = {0};
  const int size = size_of(s.dtype);
  if (i < end) memcpy(padded, (const char*)s.data + i * size, (size_t)(end - i) * size);
  return load<kMixed>(Stream{padded, s.dtype}, 0);
}

template <int kKind, bool kTail>
CONDU_INLINE Lanes load_delta(Stream model, Stream base, int64_t i, int64_t end) {
  const Lanes theta = kTail ? load_until(model, i, end) : load<kKind>(model, i);
  if (!base.data) return theta;
  return theta - (kTail ? load_until(base, i, end) : load<kKind>(base, i));
}

template <bool kBf16>
CONDU_INLINE Lanes load_unified(const void* u, int64_t i) {
  return kBf16 ? load_bf16((const uint16_t*)u + i) : load_f32((const float*)u + i);
}

// Stores the unified delta and returns its magnitude as stored.
template <bool kBf16>
CONDU_INLINE Lanes store_unified(void* u, int64_t i, Lanes value) {
  if (!kBf16) {
    store_f32((float*)u + i, value);
    return magnitude(value);
  }
  store_bf16((uint16_t*)u + i, value);
  return magnitude(load_bf16((const uint16_t*)u + i));
}

CONDU_INLINE StepBits load_bits(const uint8_t* plane, int64_t i) {
  StepBits bits;
  memcpy(&bits, plane + i / 8, sizeof bits);
  return bits;
}

CONDU_INLINE void store_bits(uint8_t* plane, int64_t i, StepBits bits) {
  memcpy(plane + i / 8, &bits, sizeof bits);
}

CONDU_INLINE Mask vector_of(StepBits bits, int v) { return mask_of((uint16_t)(bits >> (16 * v))); }

CONDU_INLINE StepBits step_bits(const Mask* masks) {
  StepBits bits = 0;
  for (int v = 0; v < kVectors; ++v) bits |= (StepBits)bits_of(masks[v]) << (16 * v);
  return bits;
}

CONDU_INLINE Mask tie_is_negative(int32_t zero_sum) {
  return mask_of(zero_sum == CONDU_NEGATIVE ? 0xffff : 0);
}

// ---- sums --------------------------------------------------------------------------------------

// One step's terms of a sum: lanes[l] += the four terms of lane l.
CONDU_INLINE void add_step(double* lanes, const Lanes* terms) {
  add_to_double(lanes, (terms[0] + terms[1]) + (terms[2] + terms[3]));
}

// The same for the terms whose mask bit is set.
CONDU_INLINE void add_step_where(double* lanes, StepBits bits, const Lanes* terms) {
  const Lanes low = add_where(keep(vector_of(bits, 0), terms[0]), vector_of(bits, 1), terms[1]);
  const Lanes high = add_where(keep(vector_of(bits, 2), terms[2]), vector_of(bits, 3), terms[3]);
  add_to_double(lanes, low + high);
}

CONDU_INLINE void end_chunk(Accumulators sums, int rows) {
  for (int r = 0; r < rows; ++r) {
    double total = 0;
    for (int l = 0; l < 16; ++l) total += sums.lanes[16 * r + l];
    sums.total[r] = total;
  }
}

// Runs step(i, Whole or Tail) over a chunk and its padding.
struct Whole {
  enum { kTail = false };
};
struct Tail {
  enum { kTail = true };
};

template <class Step>
CONDU_INLINE void for_steps(int64_t elements, Accumulators sums, int rows, Step step) {
  const int64_t padded = (elements + CONDU_ALIGN - 1) / CONDU_ALIGN * CONDU_ALIGN;
  memset(sums.lanes, 0, sizeof(double) * 16 * rows);
  int64_t i = 0;
  for (; i + kStep <= elements; i += kStep) step(i, Whole());
  for (; i < padded; i += kStep) step(i, Tail());
  end_chunk(sums, rows);
}

// ---- task triggers -----------------------------------------------------------------------------

// What an element needs to know of all old tasks: S = sum and X = max of the rescalers whose mask
// bit is set. S is added in groups of four tasks, in task order, then group by group.
CONDU_INLINE void gather(Triggers old, int64_t bit, Lanes* S, Lanes* X) {
  for (int v = 0; v < kVectors; ++v) S[v] = X[v] = splat(0.0f);
  for (int first = 0; first < old.tasks; first += 4) {
    Lanes group[kVectors];
    for (int v = 0; v < kVectors; ++v) group[v] = splat(0.0f);
    const int last = first + 4 < old.tasks ? first + 4 : old.tasks;
    for (int t = first; t < last; ++t) {
      const StepBits bits = load_bits(old.planes[t], bit);
      const Lanes rescaler = splat(old.rescaler[t]);
      for (int v = 0; v < kVectors; ++v) {
        const Mask set = vector_of(bits, v);
        group[v] = add_where(group[v], set, rescaler);
        X[v] = max_where(X[v], set, rescaler);
      }
    }
    for (int v = 0; v < kVectors; ++v) S[v] = S[v] + group[v];
  }
}

// M' = M & keep, and den' += M'·|u'|, for every old task. A lost bit never comes back. `size` is
// |u'| where the old tasks' side was kept and +0 elsewhere, so the old bits select the right terms.
CONDU_INLINE void confirm(Triggers old, int64_t bit, StepBits kept, const Lanes* size,
                          uint8_t* const* planes, double* lanes) {
  for (int t = 0; t < old.tasks; ++t) {
    const StepBits bits = load_bits(old.planes[t], bit);
    add_step_where(lanes + 16 * t, bits, size);
    store_bits(planes[t], bit, bits & kept);
  }
}

// ---- kernels -----------------------------------------------------------------------------------

template <int kKind, bool kBf16, bool kZero>
CONDU_INLINE void unify_steps(const UnifyChunk& c) {
  const Mask tie = tie_is_negative(c.zero_sum);
  double* num_lanes = c.sums.lanes;
  double* den_lanes = c.sums.lanes + 16 * c.tasks;
  for_steps(c.elements, c.sums, 2 * c.tasks, [&](int64_t i, auto end) CONDU_LAMBDA {
    constexpr bool kTail = decltype(end)::kTail;
    Lanes total[kVectors], best[kVectors], size[kVectors];
    Flag<Lanes, Mask> flag[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      total[v] = load_delta<kKind, kTail>(c.models[0], c.base, i + 16 * v, c.elements);
    }
    for (int t = 1; t < c.tasks; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        total[v] = total[v] + load_delta<kKind, kTail>(c.models[t], c.base, i + 16 * v, c.elements);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      flag[v] = elect(total[v], tie);
      best[v] = splat(0.0f);
    }
    for (int t = 0; t < c.tasks; ++t) {
      Lanes moved[kVectors];
      Mask agrees[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const Lanes d = load_delta<kKind, kTail>(c.models[t], c.base, i + 16 * v, c.elements);
        const Lanes agreed = agreeing<kZero>(d, flag[v]);
        moved[v] = magnitude(d);
        best[v] = max_of(agreed, best[v]);
        agrees[v] = above_zero(agreed);
      }
      add_step(num_lanes + 16 * t, moved);
      store_bits(c.planes[t], 8 * c.byte + i, step_bits(agrees));
    }
    for (int v = 0; v < kVectors; ++v) {
      size[v] = store_unified<kBf16>(c.u, i + 16 * v, elected(best[v], flag[v]));
    }
    for (int t = 0; t < c.tasks; ++t) {
      add_step_where(den_lanes + 16 * t, load_bits(c.planes[t], 8 * c.byte + i), size);
    }
  });
}

template <int kKind, bool kBf16>
void unify_chunk(const UnifyChunk& c) {
  c.zero_sum == CONDU_ZERO ? unify_steps<kKind, kBf16, true>(c)
                           : unify_steps<kKind, kBf16, false>(c);
}

template <int kKind, bool kBf16, bool kZero>
CONDU_INLINE void absorb_steps(const AbsorbChunk& c) {
  const Mask tie = tie_is_negative(c.zero_sum);
  const int T = c.old.tasks;
  double* new_den = c.sums.lanes + 16 * T;
  double* new_num = c.sums.lanes + 16 * (T + 1);
  for_steps(c.elements, c.sums, T + 2, [&](int64_t i, auto end) CONDU_LAMBDA {
    constexpr bool kTail = decltype(end)::kTail;
    const int64_t bit = 8 * c.byte + i;
    Lanes S[kVectors], X[kVectors], moved[kVectors], stored[kVectors], size[kVectors];
    Mask kept[kVectors], joined[kVectors];
    gather(c.old, bit, S, X);
    for (int v = 0; v < kVectors; ++v) {
      const Lanes u = load_unified<kBf16>(c.old_u, i + 16 * v);
      const Lanes d = load_delta<kKind, kTail>(c.model, c.base, i + 16 * v, c.elements);
      const Flag<Lanes, Mask> flag = elect(u * S[v] + d, tie);
      const Lanes old = agreeing<kZero>(u, flag), agreed = agreeing<kZero>(d, flag);
      kept[v] = above_zero(old);
      joined[v] = above_zero(agreed);
      const Lanes best = max_of(agreed, max_of(old * X[v], splat(0.0f)));
      stored[v] = store_unified<kBf16>(c.u, i + 16 * v, elected(best, flag));
      moved[v] = magnitude(d);
      size[v] = keep(kept[v], stored[v]);
    }
    const StepBits new_bits = step_bits(joined);
    add_step(new_num, moved);
    add_step_where(new_den, new_bits, stored);
    store_bits(c.planes[T], bit, new_bits);
    confirm(c.old, bit, step_bits(kept), size, c.planes, c.sums.lanes);
  });
}

template <int kKind, bool kBf16>
void absorb_chunk(const AbsorbChunk& c) {
  c.zero_sum == CONDU_ZERO ? absorb_steps<kKind, kBf16, true>(c)
                           : absorb_steps<kKind, kBf16, false>(c);
}

template <bool kBf16, bool kZero>
CONDU_INLINE void merge_steps(const MergeChunk& c) {
  const Mask tie = tie_is_negative(c.zero_sum);
  const int rows = c.a.tasks + c.b.tasks;
  for_steps(c.elements, c.sums, rows, [&](int64_t i, auto) CONDU_LAMBDA {
    const int64_t bit = 8 * c.byte + i;
    Lanes Sa[kVectors], Xa[kVectors], Sb[kVectors], Xb[kVectors];
    Lanes size_a[kVectors], size_b[kVectors];
    Mask kept_a[kVectors], kept_b[kVectors];
    gather(c.a, bit, Sa, Xa);
    gather(c.b, bit, Sb, Xb);
    for (int v = 0; v < kVectors; ++v) {
      const Lanes ua = load_unified<kBf16>(c.a_u, i + 16 * v);
      const Lanes ub = load_unified<kBf16>(c.b_u, i + 16 * v);
      const Flag<Lanes, Mask> flag = elect(ua * Sa[v] + ub * Sb[v], tie);
      const Lanes a = agreeing<kZero>(ua, flag), b = agreeing<kZero>(ub, flag);
      kept_a[v] = above_zero(a);
      kept_b[v] = above_zero(b);
      const Lanes best = max_of(b * Xb[v], max_of(a * Xa[v], splat(0.0f)));
      const Lanes stored = store_unified<kBf16>(c.u, i + 16 * v, elected(best, flag));
      size_a[v] = keep(kept_a[v], stored);
      size_b[v] = keep(kept_b[v], stored);
    }
    confirm(c.a, bit, step_bits(kept_a), size_a, c.planes, c.sums.lanes);
    confirm(c.b, bit, step_bits(kept_b), size_b, c.planes + c.a.tasks,
            c.sums.lanes + 16 * c.a.tasks);
  });
}

template <bool kBf16>
void merge_chunk(const MergeChunk& c) {
  c.zero_sum == CONDU_ZERO ? merge_steps<kBf16, true>(c) : merge_steps<kBf16, false>(c);
}

void measure_chunk(const MeasureChunk& c) {
  for_steps(c.elements, c.sums, 1, [&](int64_t i, auto end) CONDU_LAMBDA {
    constexpr bool kTail = decltype(end)::kTail;
    Lanes moved[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      moved[v] = magnitude(load_delta<kMixed, kTail>(c.model, c.base, i + 16 * v, c.elements));
    }
    add_step(c.sums.lanes, moved);
  });
}

template <int kKind>
CONDU_INLINE void store(void* out, uint8_t dtype, int64_t i, Lanes value) {
  switch (kKind == kMixed ? dtype : kKind) {
    case CONDU_F32:
      return store_f32((float*)out + i, value);
    case CONDU_BF16:
      return store_bf16((uint16_t*)out + i, value);
    default:
      return store_f16((uint16_t*)out + i, value);
  }
}

template <int kKind, bool kBf16>
void decouple_chunk(const DecoupleChunk& c) {
  const Lanes rescaler = splat(c.rescaler);
  for (int64_t i = 0; i < c.elements; i += 16) {
    const bool tail = i + 16 > c.elements;
    Lanes base = splat(0.0f);
    if (c.base.data) {
      base = tail ? load_until(c.base, i, c.elements) : load<kKind>(c.base, i);
    }
    const Lanes moved = base + rescaler * load_unified<kBf16>(c.u, i);
    uint16_t bits;
    memcpy(&bits, c.plane + i / 8, sizeof bits);
    const Lanes theta = choose(mask_of(bits), moved, base);
    if (!tail) {
      store<kKind>(c.out, c.out_dtype, i, theta);
      continue;
    }
    alignas(64) char padded[64];
    const int size = size_of(c.out_dtype);
    store<kKind>(padded, c.out_dtype, 0, theta);
    memcpy((char*)c.out + i * size, padded, (size_t)(c.elements - i) * size);
  }
}

}  // namespace

// A file that defines CONDU_ONE_KIND trades a switch per load for a quarter of the code.
#ifdef CONDU_ONE_KIND
#define CONDU_KIND(kind) kMixed
#else
#define CONDU_KIND(kind) kind
#endif

#define CONDU_OF_KIND(chunk, kind) {chunk<CONDU_KIND(kind), false>, chunk<CONDU_KIND(kind), true>}
#define CONDU_BY_KIND(chunk)                                          \
  {CONDU_OF_KIND(chunk, CONDU_F32), CONDU_OF_KIND(chunk, CONDU_BF16), \
   CONDU_OF_KIND(chunk, CONDU_F16), CONDU_OF_KIND(chunk, kMixed)}

#define CONDU_KERNELS(name)                 \
  {name,                                    \
   CONDU_BY_KIND(unify_chunk),              \
   CONDU_BY_KIND(absorb_chunk),             \
   CONDU_BY_KIND(decouple_chunk),           \
   {merge_chunk<false>, merge_chunk<true>}, \
   measure_chunk}

}  // namespace condu
