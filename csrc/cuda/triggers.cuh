// The old tasks of a state at an element: S, the sum of the rescalers whose mask bit is set, and X,
// the largest of them. Both depend on the pattern of bits alone, so tables in shared memory give
// them: one lookup for up to eight tasks, else one for every group of four, and two operations a
// lookup.
#pragma once
#include "cuda/sums.cuh"

// What absorb and merge know of a state, on the device.
struct State {
  const void* u;
  const float* rescaler;  // [tasks][tensors]
  uint8_t* const* planes;
  int tasks;
};

// The state at a chunk, in shared memory. kFew: at most eight tasks, one table for all.
template <bool kFew>
struct Triggers {
  float2* table;     // [256], or [groups of four][16]: S and X
  uint8_t** planes;  // from the chunk on
  int tasks;
  static __host__ __device__ int entries(int tasks) { return kFew ? 256 : (tasks + 3) / 4 * 16; }
  static __host__ __device__ size_t bytes(int tasks) {
    return entries(tasks) * sizeof(float2) + tasks * sizeof(uint8_t*);
  }

  // Not ready before the block has synchronised.
  __device__ __forceinline__ Triggers(void* memory, const State& state, const condu_chunk& chunk,
                                      int64_t tensors)
      : table((float2*)memory),
        planes((uint8_t**)(table + entries(state.tasks))),
        tasks(state.tasks) {
    const float* rescaler = state.rescaler + chunk.tensor;
    for (int i = threadIdx.x; i < entries(tasks); i += kThreads) {
      float2 entry = group(rescaler, tensors, kFew ? 0 : i / 16 * 4, i);
      if (kFew) {
        const float2 second = group(rescaler, tensors, 4, i >> 4);
        entry = make_float2(__fadd_rn(entry.x, second.x), fmaxf(entry.y, second.y));
      }
      table[i] = entry;
    }
    for (int t = threadIdx.x; t < tasks; t += kThreads) {
      planes[t] = state.planes[t] + chunk.arena / 8;
    }
  }

 private:
  // S and X of four tasks for one pattern, in task order.
  __device__ __forceinline__ float2 group(const float* rescaler, int64_t tensors, int first,
                                          int pattern) const {
    float2 entry = make_float2(0.0f, 0.0f);
    for (int b = 0; b < 4; ++b) {
      if (first + b >= tasks || !(pattern >> b & 1)) continue;
      const float value = rescaler[(first + b) * tensors];
      entry = make_float2(__fadd_rn(entry.x, value), fmaxf(entry.y, value));
    }
    return entry;
  }
};

// From a byte for each task to a byte for each element: an 8 x 8 transposition of bits, by exchange
// of 1 x 1, 2 x 2 and 4 x 4 blocks.
CONDU_DEVICE void transpose(const MaskBytes& masks, uint32_t* patterns) {
  uint32_t w[2];
  for (int i = 0; i < 2; ++i) {
    uint32_t x = masks.word[i];
    uint32_t t = (x ^ (x >> 7)) & 0x00aa00aau;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000ccccu;
    w[i] = x ^ t ^ (t << 14);
  }
  patterns[0] = (w[0] & 0x0f0f0f0fu) | ((w[1] << 4) & 0xf0f0f0f0u);
  patterns[1] = (w[1] & 0xf0f0f0f0u) | ((w[0] >> 4) & 0x0f0f0f0fu);
}

// S and X of an octet.
struct Gathered {
  float S[8], X[8];
};

// Of a state of at most eight tasks, from all of their mask bytes.
CONDU_DEVICE Gathered look_up(const Triggers<true>& old, const MaskBytes& masks) {
  uint32_t patterns[2];
  transpose(masks, patterns);
  Gathered sum;
  for (int j = 0; j < 8; ++j) {
    const float2 entry = old.table[patterns[j / 4] >> (8 * (j % 4)) & 0xffu];
    sum.S[j] = entry.x;
    sum.X[j] = entry.y;
  }
  return sum;
}

// Of any state, eight tasks at a time: groups are added in order.
template <bool kWide>
CONDU_DEVICE Gathered gather(const Triggers<false>& old, int64_t byte) {
  Gathered sum;
  for (int j = 0; j < 8; ++j) sum.S[j] = sum.X[j] = 0.0f;
#pragma unroll 1
  for (int first = 0; first < old.tasks; first += 8) {
    uint32_t patterns[2];
    transpose(load_masks<kWide>(old.planes + first, old.tasks - first, byte), patterns);
    for (int half = 0; half < 2 && first + 4 * half < old.tasks; ++half) {
      const float2* group = old.table + 4 * (first + 4 * half);
      for (int j = 0; j < 8; ++j) {
        const float2 entry = group[patterns[j / 4] >> (8 * (j % 4) + 4 * half) & 0xfu];
        sum.S[j] = __fadd_rn(sum.S[j], entry.x);
        sum.X[j] = fmaxf(sum.X[j], entry.y);
      }
    }
  }
  return sum;
}

// Under zero_sum="zero" nothing is kept and nothing joins where nothing was elected. A branch
// apart, for it is the rare rule. Returns the bits of the other elements.
CONDU_DEVICE uint32_t clear_ties(const Elected* flag, float* u) {
  uint32_t counts = 0;
  for (int j = 0; j < 8; ++j) {
    u[j] = keep(flag[j].valid, u[j]);
    if (flag[j].valid) counts |= 1u << j;
  }
  return counts;
}

// M' = M & keep for every old task, and den' = sum of M'*|u'| in its row. A lost bit never comes
// back.
template <bool kWide>
CONDU_DEVICE void confirm(const Triggers<false>& old, int64_t byte, uint32_t kept,
                          const float* size, uint8_t* const* planes, const WarpSums& sums,
                          int row) {
#pragma unroll 1
  for (int first = 0; first < old.tasks; first += 8) {
    const int count = old.tasks - first;
    MaskBytes masks = load_masks<kWide>(old.planes + first, count, byte);
    masks.keep_only(kept);
    store_masks<kWide>(planes + first, count, byte, masks);
    double den[8];
    for (int t = 0; t < 8; ++t) den[t] = sum_where(masks.of(t), size);
    sums.add(row + first, count, den);
  }
}
