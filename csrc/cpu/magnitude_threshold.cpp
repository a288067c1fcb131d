// Exact selection of the r-th largest magnitude by the radix search of magnitude_digits.h.
//
// No value is copied; the extra memory is 64 KiB a thread.
#include <limits>
#include <new>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/shares.h"
#include "magnitude_digits.h"

namespace condu {
namespace {

constexpr int kBlock = 1024;  // elements widened at a time
// Equal digits often come one after another; neighbours are counted in different copies, so that an
// increment need not wait for the one before it.
constexpr int kCopies = 4;
// From this size on all threads work on one tensor, below it each on its own.
constexpr int64_t kLarge = 1 << 18;

struct Counts {
  uint64_t of[kCopies][kDigits] = {};
};

// Counts the stage's digit of the values whose higher bits are `prefix`.
template <class Format>
void count_digits(const typename Format::Bits* values, int64_t elements, Stage stage,
                  uint32_t prefix, Counts& counts) {
  const uint32_t digit = (1u << stage.bits) - 1;
  uint32_t keys[kBlock];
  for (int64_t start = 0; start < elements; start += kBlock) {
    const int size = elements - start < kBlock ? (int)(elements - start) : kBlock;
    for (int j = 0; j < size; ++j) {
      keys[j] = Format::widen(values[start + j] & Format::kMagnitude);
    }
    int kept = size;
    if (stage.shift + stage.bits < 31) {
      kept = 0;
      for (int j = 0; j < size; ++j) {
        const uint32_t key = keys[j];
        keys[kept] = key;
        kept += key >> (stage.shift + stage.bits) == prefix;
      }
    }
    for (int j = 0; j < kept; ++j) ++counts.of[j % kCopies][(keys[j] >> stage.shift) & digit];
  }
}

// Adds the threads' counts and clears them for the next stage.
void add_counts(Counts* counts, int threads, int64_t* total) {
  for (int d = 0; d < kDigits; ++d) total[d] = 0;
  for (int thread = 0; thread < threads; ++thread) {
    for (auto& copy : counts[thread].of) {
      for (int d = 0; d < kDigits; ++d) {
        total[d] += (int64_t)copy[d];
        copy[d] = 0;
      }
    }
  }
}

// The rank-th largest magnitude of tensors [first, last).
float select(const condu_adapter* adapter, int64_t first, int64_t last, int64_t rank,
             Counts* counts, int threads) {
  if (!rank) return std::numeric_limits<float>::infinity();
  bool wide = false;
  for (int64_t k = first; k < last; ++k) wide |= adapter->dtype[k] == CONDU_F32;
  uint32_t found = 0;
  const int stages = wide ? (int)kStages : kStagesOf16Bits;
  for (int s = 0; s < stages; ++s) {
    const Stage stage = kStage[s];
    for_shares(last - first, adapter->numel + first, threads, [&](const Share& share) {
      const int64_t k = first + share.tensor;
      with_format(adapter->dtype[k], [&](auto format) {
        using Format = decltype(format);
        count_digits<Format>(elements_at<Format>(adapter, k, share.start), share.elements, stage,
                             found, counts[share.thread]);
      });
    });
    int64_t total[kDigits];
    add_counts(counts, threads, total);
    if (s == 0) {
      for (int d = kFirstNonFinite; d < kDigits; ++d) {
        if (total[d]) return std::numeric_limits<float>::quiet_NaN();
      }
    }
    int d = kDigits - 1;
    for (; total[d] < rank; --d) rank -= total[d];
    found = found << stage.bits | (uint32_t)d;
  }
  return float_of(found << kStage[stages - 1].shift);
}

}  // namespace
}  // namespace condu

using namespace condu;

extern "C" int condu_magnitude_threshold(const condu_adapter* reference, int joint,
                                         const int64_t* ranks, float* threshold, int threads) try {
  if (int failed = check_adapter(reference, threads)) return failed;
  const int64_t tensors = reference->tensors;
  if ((joint || tensors) && (!ranks || !threshold)) return CONDU_NULL_POINTER;
  int64_t elements = 0;
  for (int64_t k = 0; k < tensors; ++k) elements += reference->numel[k];
  for (int64_t k = 0; k < (joint ? 1 : tensors); ++k) {
    if (ranks[k] < 0 || ranks[k] > (joint ? elements : reference->numel[k])) {
      return CONDU_BAD_ARGUMENT;
    }
  }

  std::vector<Counts> counts(threads);
  if (joint) {
    threshold[0] = select(reference, 0, tensors, ranks[0], counts.data(), threads);
    return CONDU_OK;
  }
  for (int64_t k = 0; k < tensors; ++k) {
    if (reference->numel[k] < kLarge) continue;
    threshold[k] = select(reference, k, k + 1, ranks[k], counts.data(), threads);
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    for (int64_t k = thread; k < tensors; k += threads) {
      if (reference->numel[k] >= kLarge) continue;
      threshold[k] = select(reference, k, k + 1, ranks[k], &counts[thread], 1);
    }
  }
  return CONDU_OK;
} catch (const std::exception&) {
  return CONDU_NO_MEMORY;
}
