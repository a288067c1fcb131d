// Exact selection of the r-th largest magnitude by the radix search of magnitude_digits.h, for each
// tensor or for all tensors together (a *group* of values).
//
// Each stage reads the values once: blocks count digits in shared memory and add what they found to
// their group's counts, with integer atomics, whose sums do not depend on the order. One block a
// group then finds the digit. Nothing returns to the host between the stages.
#include "condu_cuda_alignment.h"
#include "cuda/patterns.cuh"
#include "magnitude_digits.h"

namespace {

// What is known of a group's magnitude.
struct Search {
  unsigned long long rank;  // among the values that share the bits found; 0: nothing is searched
  uint32_t found;
  int32_t finite;
};

struct Searches {
  unsigned long long* counts;  // [groups][kDigits]
  Search* search;              // [groups]
};

Searches searches_in(void* workspace, int64_t groups) {
  auto* const counts = (unsigned long long*)workspace;
  return {counts, (Search*)(counts + groups * kDigits)};
}

// ---- begin -------------------------------------------------------------------------------------

struct Begin {
  Searches to;
  const int64_t* ranks;
};

__global__ void begin_kernel(Begin b) {
  const int64_t group = blockIdx.x;
  for (int d = threadIdx.x; d < kDigits; d += kThreads) b.to.counts[group * kDigits + d] = 0;
  if (threadIdx.x == 0) b.to.search[group] = {(unsigned long long)b.ranks[group], 0, 1};
}

// ---- count -------------------------------------------------------------------------------------

struct Count {
  Work work;
  int joint;
  Stage stage;
  Searches to;
};

CONDU_DEVICE void count_digit(uint32_t* counts, uint32_t pattern, Stage stage, uint32_t found) {
  const uint32_t magnitude = pattern & Float32::kMagnitude;
  if (magnitude >> (stage.shift + stage.bits) != found) return;
  atomicAdd(counts + (magnitude >> stage.shift & ((1u << stage.bits) - 1)), 1u);
}

template <int kKind>
__global__ void __launch_bounds__(kThreads) count_kernel(Count c) {
  using Format = typename FormatOf<kKind>::Type;
  enum { kPer = Pack<Format>::kElements, kFlight = 4 };
  const Tile tile(c.work);
  if (tile.empty()) return;
  const int64_t group = c.joint ? 0 : tile.chunk.tensor;
  const uint32_t found = c.to.search[group].found;
  uint32_t* const counts = (uint32_t*)shared_memory;
  for (int d = threadIdx.x; d < kDigits; d += kThreads) counts[d] = 0;
  __syncthreads();

  const Stream values = stream_of(c.work, 0, tile.chunk);
  const Span span(tile);
  if (kKind != CONDU_GENERAL) {
    const uint4* const vectors = (const uint4*)values.data;
    const int end = span.end / kPer;
#pragma unroll 1
    for (int at = span.first / kPer + threadIdx.x; at < end; at += kFlight * kThreads) {
      uint4 v[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (at + f * kThreads < end) v[f] = __ldg(vectors + at + f * kThreads);
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (at + f * kThreads >= end) continue;
        const Pack<Format> pack(v[f]);
        for (int j = 0; j < kPer; ++j) {
          count_digit(counts, Format::widen(pack.get(j)), c.stage, found);
        }
      }
    }
  } else {
    for (int i = span.first + threadIdx.x; i < span.end; i += kThreads) {
      count_digit(counts, widened(values, i), c.stage, found);
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kDigits; d += kThreads) {
    if (counts[d]) atomicAdd(c.to.counts + group * kDigits + d, (unsigned long long)counts[d]);
  }
}

// ---- descend -----------------------------------------------------------------------------------

struct Descend {
  Searches of;
  Stage stage;
};

// Finds the digit of the group's magnitude and clears the counts for the next stage.
__global__ void __launch_bounds__(kThreads) descend_kernel(Descend d) {
  enum { kOwn = kDigits / kThreads };
  unsigned long long* const counts =
      d.of.counts + (int64_t)blockIdx.x * kDigits + kOwn * threadIdx.x;
  Search* const search = d.of.search + blockIdx.x;
  const Search before = *search;
  unsigned long long own[kOwn], sum = 0;
  for (int i = 0; i < kOwn; ++i) {
    own[i] = counts[i];
    sum += own[i];
    counts[i] = 0;
  }
  unsigned long long* const sums = (unsigned long long*)shared_memory;
  sums[threadIdx.x] = sum;
  __syncthreads();  // also: all have read the search

  unsigned long long above = 0;
  for (int t = threadIdx.x + 1; t < kThreads; ++t) above += sums[t];
  if (before.rank > above && before.rank <= above + sum) {
    unsigned long long rank = before.rank - above;
    int i = kOwn - 1;
    for (; own[i] < rank; --i) rank -= own[i];
    search->rank = rank;
    search->found = before.found << d.stage.bits | (uint32_t)(kOwn * threadIdx.x + i);
  }
  const bool first = d.stage.shift + d.stage.bits == 31;
  if (first && kOwn * (int)threadIdx.x >= kFirstNonFinite && sum) search->finite = 0;
}
static_assert(kFirstNonFinite % (kDigits / kThreads) == 0, "a thread has all of them or none");

// ---- finish ------------------------------------------------------------------------------------

struct Finish {
  const Search* search;
  int64_t groups;
  int missing;  // low bits that are zero in all values
  float* threshold;
};

__global__ void finish_kernel(Finish f) {
  const int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (group >= f.groups) return;
  const Search search = f.search[group];
  const uint32_t value = search.finite ? search.found << f.missing : 0x7fc00000u;
  f.threshold[group] = float_of(search.rank ? value : (uint32_t)Float32::kInfinity);
}

}  // namespace

extern "C" int64_t condu_cuda_threshold_workspace(int64_t groups) {
  return groups * (int64_t)(kDigits * sizeof(unsigned long long) + sizeof(Search));
}

extern "C" int condu_cuda_magnitude_threshold(const condu_place* place, const condu_work* work,
                                              int joint, const int64_t* ranks, float* threshold) {
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  static void (*const kernels[CONDU_KINDS])(Count) = {
      count_kernel<CONDU_ALL_F32>, count_kernel<CONDU_ALL_BF16>, count_kernel<CONDU_ALL_F16>,
      count_kernel<CONDU_GENERAL>};
  const int64_t groups = joint ? 1 : work->tensors;
  const Searches searches = searches_in(place->workspace, groups);
  const bool wide = work->of_kind[CONDU_ALL_F32] || work->of_kind[CONDU_GENERAL];
  const int stages = wide ? (int)kStages : kStagesOf16Bits;

  CONDU_TRY(launch(place, begin_kernel, groups, 0, Begin{searches, ranks}));
  for (int s = 0; s < stages; ++s) {
    CONDU_TRY(for_kinds(work, [&](int kind, int64_t blocks, Work part) {
      return launch(place, kernels[kind], blocks, kDigits * sizeof(uint32_t),
                    Count{part, joint, kStage[s], searches});
    }));
    CONDU_TRY(launch(place, descend_kernel, groups, kThreads * sizeof(unsigned long long),
                     Descend{searches, kStage[s]}));
  }
  return launch(place, finish_kernel, (groups + kThreads - 1) / kThreads, 0,
                Finish{searches.search, groups, kStage[stages - 1].shift, threshold});
}
