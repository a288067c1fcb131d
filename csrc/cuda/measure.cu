// Measure: the sum of |model - base|, without writing anything else.
#include "cuda/sums.cuh"

namespace {

struct Measure {
  Work work;
  Workspace space;
  int has_base;
};

template <int kKind>
__global__ void __launch_bounds__(kThreads, 4) measure_kernel(Measure a) {
  constexpr int kFlight = kKind == CONDU_GENERAL ? 1 : 2;  // octets that are loaded together
  const Tile tile(a.work);
  if (tile.empty()) return;
  const int end = tile.chunk.elements;
  const Stream model = stream_of(a.work, 0, tile.chunk);
  const Stream base = base_of(a.work, 1, a.has_base, tile.chunk);
  double num = 0.0;
#pragma unroll 1
  for (int k = 0; k < kOctets; k += kFlight) {
    Octet<kKind> theta[kFlight], theta_0[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      theta[i].load(model, tile.run(k + i), end);
      if (base.data) theta_0[i].load(base, tile.run(k + i), end);
    }
    for (int i = 0; i < kFlight; ++i) {
      for (int q = 0; q < 2; ++q) {
        float start[4], d[4];
        unpack_base(theta_0[i].of(q), base, q % theta[i].kQuads, start);
        delta(theta[i].of(q), model, q % theta[i].kQuads, start, d);
        num = __dadd_rn(num, sum_of_magnitudes(d));
      }
    }
  }
  const ThreadSums sums = {(double*)shared_memory, 1};
  sums.clear();
  sums.add(0, num);
  sums.store(a.space, tile);
}

}  // namespace

extern "C" int condu_cuda_measure(const condu_place* place, const condu_work* work, int has_base,
                                  double* sums) {
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  const Workspace space(place, chunks_of(work), 1);
  CONDU_TRY(for_kinds(work, [&](int kind, int64_t blocks, Work part) {
    static void (*const kernels[CONDU_KINDS])(Measure) = {
        measure_kernel<CONDU_ALL_F32>, measure_kernel<CONDU_ALL_BF16>,
        measure_kernel<CONDU_ALL_F16>, measure_kernel<CONDU_GENERAL>};
    return launch(place, kernels[kind], blocks, ThreadSums::bytes(1),
                  Measure{part, space, has_base});
  }));
  return add_tiles(place, work, space, sums);
}
