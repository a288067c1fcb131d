// Aligning the current adapter with the reference, and averaging it into the reference.
//
// Both read two streams and write one of them back; a thread has four vectors of each in flight.
// The written stream is never read through the read-only path.
#include "alignment_rule.h"
#include "condu_cuda_alignment.h"
#include "cuda/patterns.cuh"

namespace {

// `change(written, read)` gives the new bits of an element of the written stream.
template <int kKind>
struct Pass {
  using Format = typename FormatOf<kKind>::Type;
  enum { kFlight = 4, kPer = Pack<Format>::kElements };

  template <class Change>
  static __device__ __forceinline__ void run(Stream written, Stream read, Span span,
                                             Change change) {
    uint4* const out = (uint4*)written.data;
    const uint4* const in = (const uint4*)read.data;
    const int end = span.end / kPer;  // chunks of this kind hold whole vectors
#pragma unroll 1
    for (int at = span.first / kPer + threadIdx.x; at < end; at += kFlight * kThreads) {
      uint4 a[kFlight], b[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (at + f * kThreads >= end) continue;
        a[f] = __ldcg(out + at + f * kThreads);
        b[f] = __ldg(in + at + f * kThreads);
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (at + f * kThreads >= end) continue;
        Pack<Format> mine(a[f]);
        const Pack<Format> other(b[f]);
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          mine.put(j, change(mine.get(j), other.get(j)));
        }
        __stcg(out + at + f * kThreads, mine.vector());
      }
    }
  }
};

// ---- align -------------------------------------------------------------------------------------

struct Align {
  Work work;  // current, reference
  const float* threshold;
  int to_reference;
  unsigned long long* conflicts;
};

// Integers: their sum does not depend on the order.
CONDU_DEVICE void add_to_conflicts(unsigned long long* conflicts, int hits) {
  int* const of_warp = (int*)shared_memory;
  for (int distance = 16; distance; distance /= 2) {
    hits += __shfl_xor_sync(0xffffffffu, hits, distance);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = hits;
  __syncthreads();
  if (threadIdx.x) return;
  unsigned long long total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w];
  if (total) atomicAdd(conflicts, total);
}

template <int kKind>
__global__ void __launch_bounds__(kThreads) align_kernel(Align a) {
  using Format = typename FormatOf<kKind>::Type;
  const Tile tile(a.work);
  if (tile.empty()) return;
  const Stream current = stream_of(a.work, 0, tile.chunk);
  const Stream reference = stream_of(a.work, 1, tile.chunk);
  const typename Format::Bits lowest = lowest_magnitude<Format>(a.threshold[tile.chunk.tensor]);
  const Span span(tile);
  int hits = 0;
  if (kKind != CONDU_GENERAL) {
    Pass<kKind>::run(
        current, reference, span, [&](typename Format::Bits w, typename Format::Bits g) {
          const bool conflict = in_conflict<Format, Format>(g, w, lowest);
          hits += conflict;
          const typename Format::Bits value = a.to_reference ? g : (typename Format::Bits)0;
          return conflict ? value : w;
        });
  } else {
    // In fp32, which holds the values of every dtype exactly and in the same order.
    for (int i = span.first + threadIdx.x; i < span.end; i += kThreads) {
      const uint32_t g = widened(reference, i), w = widened(current, i);
      if (!in_conflict<Float32, Float32>(g, w, lowest)) continue;
      ++hits;
      put_narrowed(current, i, a.to_reference ? g : 0);
    }
  }
  add_to_conflicts(a.conflicts, hits);
}

// ---- average -----------------------------------------------------------------------------------

struct Average {
  Work work;  // reference, current
  Shares shares;
};

template <int kKind>
__global__ void __launch_bounds__(kThreads) average_kernel(Average a) {
  using Format = typename FormatOf<kKind>::Type;
  const Tile tile(a.work);
  if (tile.empty()) return;
  const Stream reference = stream_of(a.work, 0, tile.chunk);
  const Stream current = stream_of(a.work, 1, tile.chunk);
  const Span span(tile);
  if (kKind != CONDU_GENERAL) {
    Pass<kKind>::run(
        reference, current, span, [&](typename Format::Bits g, typename Format::Bits w) {
          return Format::narrow(averaged(Format::widen(g), Format::widen(w), a.shares));
        });
  } else {
    for (int i = span.first + threadIdx.x; i < span.end; i += kThreads) {
      put_narrowed(reference, i, averaged(widened(reference, i), widened(current, i), a.shares));
    }
  }
}

template <class Arguments>
using Kernels = void (*const[CONDU_KINDS])(Arguments);

}  // namespace

extern "C" int condu_cuda_align(const condu_place* place, const condu_work* work,
                                const float* threshold, int to_reference, uint64_t* conflicts) {
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  static Kernels<Align> kernels = {align_kernel<CONDU_ALL_F32>, align_kernel<CONDU_ALL_BF16>,
                                   align_kernel<CONDU_ALL_F16>, align_kernel<CONDU_GENERAL>};
  return for_kinds(work, [&](int kind, int64_t blocks, Work part) {
    return launch(place, kernels[kind], blocks, kWarps * sizeof(int),
                  Align{part, threshold, to_reference, (unsigned long long*)conflicts});
  });
}

extern "C" int condu_cuda_average(const condu_place* place, const condu_work* work, double weight) {
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  static Kernels<Average> kernels = {average_kernel<CONDU_ALL_F32>, average_kernel<CONDU_ALL_BF16>,
                                     average_kernel<CONDU_ALL_F16>, average_kernel<CONDU_GENERAL>};
  const Shares shares = shares_of(weight);
  return for_kinds(work, [&](int kind, int64_t blocks, Work part) {
    return launch(place, kernels[kind], blocks, 0, Average{part, shares});
  });
}
