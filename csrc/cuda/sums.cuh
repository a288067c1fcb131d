// Sums of a tile: fp32 over four neighbours, (a + b) + (c + d); fp64 from there on, over the
// threads of a block in a fixed order. No atomics: the same bits on every run and every GPU.
#pragma once
#include "cuda/launch.cuh"

CONDU_DEVICE double sum_of_magnitudes(const float* quad) {
  return __fadd_rn(__fadd_rn(fabsf(quad[0]), fabsf(quad[1])),
                   __fadd_rn(fabsf(quad[2]), fabsf(quad[3])));
}

// Of an octet's magnitudes, those whose bit is set. Adding +0 changes nothing, so the second of
// each pair is added or not.
CONDU_DEVICE double sum_where(uint32_t bits, const float* v) {
  float four[2];
  for (int q = 0; q < 2; ++q, v += 4, bits >>= 4) {
    float low = keep(bits & 1, v[0]), high = keep(bits & 4, v[2]);
    if (bits & 2) low = __fadd_rn(low, v[1]);
    if (bits & 8) high = __fadd_rn(high, v[3]);
    four[q] = __fadd_rn(low, high);
  }
  return __dadd_rn(four[0], four[1]);
}

CONDU_DEVICE double from_lane(double value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Adds eight values of each thread over the warp and the result to eight rows in shared memory.
// Each exchange halves what a thread still holds: 9 instead of 40.
CONDU_DEVICE void add_to_rows(double* rows, int count, const double* values) {
  const int lane = threadIdx.x & 31;
  double four[4], two[2];
  for (int i = 0; i < 4; ++i) {
    const double mine = lane & 16 ? values[i + 4] : values[i];
    four[i] = __dadd_rn(mine, from_lane(lane & 16 ? values[i] : values[i + 4], 16));
  }
  for (int i = 0; i < 2; ++i) {
    const double mine = lane & 8 ? four[i + 2] : four[i];
    two[i] = __dadd_rn(mine, from_lane(lane & 8 ? four[i] : four[i + 2], 8));
  }
  const double mine = lane & 4 ? two[1] : two[0];
  double one = __dadd_rn(mine, from_lane(lane & 4 ? two[0] : two[1], 4));
  one = __dadd_rn(one, from_lane(one, 2));
  one = __dadd_rn(one, from_lane(one, 1));
  const int row = lane / 4;
  if (lane % 4 == 0 && row < count) rows[row] = __dadd_rn(rows[row], one);
}

CONDU_DEVICE void put_tile_sum(const Workspace& space, const Tile& tile, int row, double sum) {
  space.tile_sums[(row * space.chunks + tile.chunk.id) * CONDU_TILES + tile.number] = sum;
}

// Sums of a few rows: every thread adds up its own, in shared memory rather than in registers,
// which the deltas need.
struct ThreadSums {
  double* all;  // [rows][kThreads]
  int rows;
  static __host__ __device__ size_t bytes(int rows) { return sizeof(double) * kThreads * rows; }
  __device__ __forceinline__ void clear() const {
    for (int r = 0; r < rows; ++r) all[r * kThreads + threadIdx.x] = 0.0;
  }
  __device__ __forceinline__ void add(int row, double value) const {
    double& mine = all[row * kThreads + threadIdx.x];
    mine = __dadd_rn(mine, value);
  }
  // At the end of a block: a warp a row.
  __device__ __forceinline__ void store(const Workspace& space, const Tile& tile) const {
    __syncthreads();
    const int lane = threadIdx.x & 31;
    for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
      double sum = all[r * kThreads + lane];
      for (int w = 1; w < kWarps; ++w) sum = __dadd_rn(sum, all[r * kThreads + 32 * w + lane]);
      for (int d = 16; d; d /= 2) sum = __dadd_rn(sum, from_lane(sum, d));
      if (lane == 0) put_tile_sum(space, tile, r, sum);
    }
  }
};

// Sums of many rows: added over a warp as soon as eight of them are there.
struct WarpSums {
  double* all;  // [kWarps][rows]
  int rows;
  static __host__ __device__ size_t bytes(int rows) { return sizeof(double) * kWarps * rows; }
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < kWarps * rows; i += kThreads) all[i] = 0.0;
  }
  // Eight values of each thread to the rows from `row` on, of which `count` exist. All threads of
  // the warp take part.
  __device__ __forceinline__ void add(int row, int count, const double* values) const {
    add_to_rows(all + (int)(threadIdx.x / 32) * rows + row, count, values);
  }
  // At the end of a block.
  __device__ __forceinline__ void store(const Workspace& space, const Tile& tile) const {
    __syncthreads();
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      double sum = all[r];
      for (int w = 1; w < kWarps; ++w) sum = __dadd_rn(sum, all[w * rows + r]);
      put_tile_sum(space, tile, r, sum);
    }
  }
};
