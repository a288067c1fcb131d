// Merge: absorb with a second state in place of a model. Both sides' masks are read twice, the
// second time from the caches.
#include "cuda/triggers.cuh"

namespace {

struct Merge {
  Work work;
  Workspace space;
  State a, b;
  int zero_sum;
  void* u;
  uint8_t* const* planes;
};

size_t shared_bytes(int tasks_a, int tasks_b) {
  const int tasks = tasks_a + tasks_b;
  return WarpSums::bytes(tasks) + Triggers<false>::bytes(tasks_a) +
         Triggers<false>::bytes(tasks_b) + tasks * sizeof(uint8_t*);
}

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(Merge m) {
  constexpr bool kWide = !kBf16;
  const Tile tile(m.work);
  if (tile.empty()) return;
  const int tasks = m.a.tasks + m.b.tasks;
  unsigned char* memory = shared_memory;
  const WarpSums sums = {(double*)memory, tasks};
  memory += WarpSums::bytes(tasks);
  const Triggers<false> a(memory, m.a, tile.chunk, m.work.tensors);
  memory += Triggers<false>::bytes(m.a.tasks);
  const Triggers<false> b(memory, m.b, tile.chunk, m.work.tensors);
  uint8_t** const planes = (uint8_t**)(memory + Triggers<false>::bytes(m.b.tasks));
  sums.clear();
  for (int t = threadIdx.x; t < tasks; t += kThreads) {
    planes[t] = m.planes[t] + tile.chunk.arena / 8;
  }
  __syncthreads();

#pragma unroll 1
  for (int k = 0; k < kOctets; ++k) {
    const int at = tile.run(k);
    if (at >= tile.padded) break;
    RawUnified<kWide, kBf16> raw_a, raw_b;
    raw_a.load(m.a.u, tile.chunk.arena + at);
    raw_b.load(m.b.u, tile.chunk.arena + at);
    const Gathered of_a = gather<kWide>(a, at / 8), of_b = gather<kWide>(b, at / 8);
    float u_a[8], u_b[8], u[8];
    raw_a.unpack(u_a);
    raw_b.unpack(u_b);
    uint32_t kept_a = 0, kept_b = 0;
    Elected flag[8];
    for (int j = 7; j >= 0; --j) {
      const float total = __fadd_rn(__fmul_rn(u_a[j], of_a.S[j]), __fmul_rn(u_b[j], of_b.S[j]));
      flag[j] = elect(total, tie_for(m.zero_sum == CONDU_NEGATIVE));
      const float seen_a = agreeing<false>(u_a[j], flag[j]);
      const float seen_b = agreeing<false>(u_b[j], flag[j]);
      const float best =
          fmaxf(__fmul_rn(seen_b, of_b.X[j]), fmaxf(__fmul_rn(seen_a, of_a.X[j]), 0.0f));
      kept_a = append_above_zero(kept_a, seen_a);
      kept_b = append_above_zero(kept_b, seen_b);
      u[j] = elected(best, flag[j]);
    }
    if (m.zero_sum == CONDU_ZERO) {
      const uint32_t counts = clear_ties(flag, u);
      kept_a &= counts;
      kept_b &= counts;
    }
    store_unified<kWide, kBf16>(m.u, tile.chunk.arena + at, u);
    confirm<kWide>(a, at / 8, kept_a, u, planes, sums, 0);
    confirm<kWide>(b, at / 8, kept_b, u, planes + a.tasks, sums, a.tasks);
  }
  sums.store(m.space, tile);
}

}  // namespace

extern "C" int condu_cuda_merge(const condu_place* place, const condu_work* work,
                                const condu_state* a, const condu_state* b, int zero_sum, void* u,
                                uint8_t* const* planes, double* sums) {
  if (a->dtype != b->dtype) return CONDU_BAD_ARGUMENT;
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  const int tasks = a->tasks + b->tasks;
  const Workspace space(place, chunks_of(work), tasks);
  CONDU_TRY(copy_planes(place, space.planes, a->planes, a->tasks));
  CONDU_TRY(copy_planes(place, space.planes + a->tasks, b->planes, b->tasks));
  CONDU_TRY(copy_planes(place, space.planes + tasks, planes, tasks));
  const State left = {a->u, a->rescaler, space.planes, a->tasks};
  const State right = {b->u, b->rescaler, space.planes + a->tasks, b->tasks};
  CONDU_TRY(for_kinds(work, [&](int, int64_t blocks, Work part) {
    return launch(place, a->dtype == CONDU_BF16 ? merge_kernel<true> : merge_kernel<false>, blocks,
                  shared_bytes(a->tasks, b->tasks),
                  Merge{part, space, left, right, zero_sum, u, space.planes + tasks});
  }));
  return add_tiles(place, work, space, sums);
}
