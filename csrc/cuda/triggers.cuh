// The old tasks of a state at an element: S, the sum of the rescalers whose mask bit is set, and X,
// the largest of them. Four tasks have sixteen patterns of bits: a table in shared memory gives S
// and X of a group, so an element costs one lookup and two operations for every four tasks.
#pragma once
#include "cuda/sums.cuh"

// What absorb and merge know of a state, on the device.
struct State {
  const void* u;
  const float* rescaler;  // [tasks][tensors]
  uint8_t* const* planes;
  int tasks;
};

// The state at a chunk, in shared memory.
struct Triggers {
  float2* table;     // [groups of four][16]: S and X
  uint8_t** planes;  // from the chunk on
  int tasks;
  static __host__ __device__ int groups(int tasks) { return (tasks + 3) / 4; }
  static __host__ __device__ size_t bytes(int tasks) {
    return groups(tasks) * 16 * sizeof(float2) + tasks * sizeof(uint8_t*);
  }

  // Not ready before the block has synchronised.
  __device__ __forceinline__ Triggers(void* memory, const State& state, const condu_chunk& chunk,
                                      int64_t tensors)
      : table((float2*)memory),
        planes((uint8_t**)(table + 16 * groups(state.tasks))),
        tasks(state.tasks) {
    for (int i = threadIdx.x; i < 16 * groups(tasks); i += kThreads) {
      float2 entry = make_float2(0.0f, 0.0f);
      for (int b = 0; b < 4; ++b) {
        const int t = i / 16 * 4 + b;
        if (t >= tasks || !(i >> b & 1)) continue;
        const float rescaler = state.rescaler[t * tensors + chunk.tensor];
        entry.x = __fadd_rn(entry.x, rescaler);  // in task order
        entry.y = fmaxf(entry.y, rescaler);
      }
      table[i] = entry;
    }
    for (int t = threadIdx.x; t < tasks; t += kThreads) {
      planes[t] = state.planes[t] + chunk.arena / 8;
    }
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

// S and X of an octet, gathered eight tasks at a time: groups are added in order.
struct Gathered {
  float S[8], X[8];
  __device__ __forceinline__ Gathered() {
    for (int j = 0; j < 8; ++j) S[j] = X[j] = 0.0f;
  }
  __device__ __forceinline__ void add(const Triggers& old, int first, const MaskBytes& masks) {
    uint32_t patterns[2];
    transpose(masks, patterns);
    const float2* group = old.table + 4 * first;
    add_group(group, patterns[0] & 0x0f0f0f0fu, patterns[1] & 0x0f0f0f0fu);
    if (first + 4 < old.tasks) {
      add_group(group + 16, patterns[0] >> 4 & 0x0f0f0f0fu, patterns[1] >> 4 & 0x0f0f0f0fu);
    }
  }

 private:
  __device__ __forceinline__ void add_group(const float2* group, uint32_t low, uint32_t high) {
    for (int j = 0; j < 8; ++j) {
      const float2 entry = group[(j < 4 ? low : high) >> (8 * (j % 4)) & 0xffu];
      S[j] = __fadd_rn(S[j], entry.x);
      X[j] = fmaxf(X[j], entry.y);
    }
  }
};

template <bool kWide>
CONDU_DEVICE Gathered gather(const Triggers& old, int64_t byte) {
  Gathered sum;
#pragma unroll 1
  for (int first = 0; first < old.tasks; first += 8) {
    sum.add(old, first, load_masks<kWide>(old.planes + first, old.tasks - first, byte));
  }
  return sum;
}

// M' = M & keep for every old task, and den' = sum of M'*|u'| in its row. A lost bit never comes
// back.
template <bool kWide>
CONDU_DEVICE void confirm(const Triggers& old, int64_t byte, uint32_t kept, const float* size,
                          uint8_t* const* planes, const WarpSums& sums, int row) {
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
