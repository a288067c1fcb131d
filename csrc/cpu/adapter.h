// How the CPU kernels of aligned merging read an adapter: the checks of what would crash, and the
// step from a dtype at run time to a format at compile time.
#pragma once
#include "alignment.h"
#include "formats.h"

namespace condu {
namespace {

int check_adapter(const condu_adapter* adapter, int threads) {
  if (!adapter || (adapter->tensors && !adapter->numel)) return CONDU_NULL_POINTER;
  if (adapter->tensors < 0 || threads < 1) return CONDU_BAD_ARGUMENT;
  for (int64_t k = 0; k < adapter->tensors; ++k) {
    if (adapter->numel[k] < 0) return CONDU_BAD_ARGUMENT;
    if (!adapter->numel[k]) continue;
    if (!adapter->data || !adapter->dtype || !adapter->data[k]) return CONDU_NULL_POINTER;
    if (adapter->dtype[k] > CONDU_F16) return CONDU_BAD_ARGUMENT;
  }
  return CONDU_OK;
}

// Calls work(format) with the format of a dtype.
template <class Work>
auto with_format(uint8_t dtype, Work work) {
  if (dtype == CONDU_BF16) return work(BFloat16{});
  if (dtype == CONDU_F16) return work(Float16{});
  return work(Float32{});
}

template <class Format>
typename Format::Bits* elements_at(const condu_adapter* adapter, int64_t tensor, int64_t start) {
  return (typename Format::Bits*)adapter->data[tensor] + start;
}

}  // namespace
}  // namespace condu
