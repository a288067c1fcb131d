// Aligning the current adapter with the reference, and averaging it into the reference: one pass
// over memory each, by plain loops that the compiler turns into vector code.
#include <vector>

#include "alignment_rule.h"
#include "cpu/adapter.h"
#include "cpu/shares.h"
#include "cpu/vector_code.h"

namespace condu {
namespace {

// Two adapters over the same tensors.
int check_adapters(const condu_adapter* a, const condu_adapter* b, int threads) {
  if (int failed = check_adapter(a, threads)) return failed;
  if (int failed = check_adapter(b, threads)) return failed;
  if (a->tensors != b->tensors) return CONDU_BAD_ARGUMENT;
  for (int64_t k = 0; k < a->tensors; ++k) {
    if (a->numel[k] != b->numel[k]) return CONDU_BAD_ARGUMENT;
  }
  return condu_cpu_isa() ? CONDU_OK : CONDU_BAD_ARGUMENT;
}

// Elements whose hits fit a 16-bit counter, which lets them be counted in lanes of their own width.
constexpr int64_t kBlock = 16384;

template <class G, class W, bool kToReference>
CONDU_INLINED inline int64_t align(typename W::Bits* __restrict__ w,
                                   const typename G::Bits* __restrict__ g, int64_t elements,
                                   typename G::Bits lowest) {
  int64_t conflicts = 0;
  for (int64_t start = 0; start < elements; start += kBlock) {
    const int64_t end = elements - start < kBlock ? elements : start + kBlock;
    typename W::Signed hits = 0;
    for (int64_t j = start; j < end; ++j) {
      const bool conflict = in_conflict<G, W>(g[j], w[j], lowest);
      const auto all = (typename W::Bits)(0 - conflict);  // a mask of the value's own width
      typename W::Bits value = 0;
      if (kToReference) value = Converted<G, W>::of(g[j]);
      w[j] = (typename W::Bits)((value & all) | (w[j] & ~all));
      hits = (typename W::Signed)(hits + conflict);
    }
    conflicts += hits;
  }
  return conflicts;
}

template <class G, class W>
CONDU_INLINED inline void average(typename G::Bits* __restrict__ g,
                                  const typename W::Bits* __restrict__ w, int64_t elements,
                                  Shares shares) {
  for (int64_t j = 0; j < elements; ++j) {
    g[j] = G::narrow(averaged(G::widen(g[j]), W::widen(w[j]), shares));
  }
}

}  // namespace
}  // namespace condu

using namespace condu;

extern "C" int condu_align(const condu_adapter* current, const condu_adapter* reference,
                           const float* threshold, int to_reference, int64_t* conflicts,
                           int threads) try {
  if (int failed = check_adapters(current, reference, threads)) return failed;
  if (!conflicts || (current->tensors && !threshold)) return CONDU_NULL_POINTER;

  const Vectors vectors = widest_vectors();
  std::vector<int64_t> found(threads);
  for_shares(current->tensors, current->numel, threads, [&](const Share& share) {
    const int64_t k = share.tensor;
    with_format(reference->dtype[k], [&](auto g) {
      with_format(current->dtype[k], [&](auto w) {
        using G = decltype(g);
        using W = decltype(w);
        auto* w_at = elements_at<W>(current, k, share.start);
        const auto* g_at = elements_at<G>(reference, k, share.start);
        const auto lowest = lowest_magnitude<G>(threshold[k]);
        int64_t& count = found[share.thread];
        with_vectors(vectors, [&]() CONDU_INLINED {
          count += to_reference ? align<G, W, true>(w_at, g_at, share.elements, lowest)
                                : align<G, W, false>(w_at, g_at, share.elements, lowest);
        });
      });
    });
  });
  *conflicts = 0;
  for (const int64_t count : found) *conflicts += count;
  return CONDU_OK;
} catch (const std::exception&) {
  return CONDU_NO_MEMORY;
}

extern "C" int condu_average(const condu_adapter* reference, const condu_adapter* current,
                             double weight, int threads) {
  if (int failed = check_adapters(reference, current, threads)) return failed;
  const Vectors vectors = widest_vectors();
  for_shares(reference->tensors, reference->numel, threads, [&](const Share& share) {
    const int64_t k = share.tensor;
    with_format(reference->dtype[k], [&](auto g) {
      with_format(current->dtype[k], [&](auto w) {
        using G = decltype(g);
        using W = decltype(w);
        auto* g_at = elements_at<G>(reference, k, share.start);
        const auto* w_at = elements_at<W>(current, k, share.start);
        const Shares shares = shares_of(weight);
        with_vectors(vectors,
                     [&]() CONDU_INLINED { average<G, W>(g_at, w_at, share.elements, shares); });
      });
    });
  });
  return CONDU_OK;
}
