// Work shared among threads in contiguous runs of equal element counts, the same way on every call,
// so that a thread meets the memory it touched first.
#pragma once
#include <stdint.h>

#include "cpu/floating_point.h"

namespace condu {
namespace {

// A run of elements of one tensor that one thread works on.
struct Share {
  int64_t tensor, start, elements;
  int thread;
};

// Calls work(share) from `threads` threads until every element of the tensors is covered.
template <class Work>
void for_shares(int64_t tensors, const int64_t* numel, int threads, Work work) {
  int64_t elements = 0;
  for (int64_t k = 0; k < tensors; ++k) elements += numel[k];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const DefaultFloatingPoint scope;
    // Not elements * thread / threads, which could overflow.
    const int64_t share = elements / threads + 1;
    const int64_t from = share * thread, to = from + share;
    int64_t seen = 0;
    for (int64_t k = 0; k < tensors && seen < to; seen += numel[k++]) {
      const int64_t start = from > seen ? from - seen : 0;
      const int64_t end = to - seen < numel[k] ? to - seen : numel[k];
      if (start < end) work(Share{k, start, end - start, thread});
    }
  }
}

}  // namespace
}  // namespace condu
