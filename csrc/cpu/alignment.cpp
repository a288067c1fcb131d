// Aligning the current adapter with the reference, and averaging it into the reference: one pass
// over memory each, by plain loops that the compiler turns into vector code.
#include <type_traits>
#include <vector>

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

// The smallest magnitude of a format, other than zero, that reaches the threshold: zeros never
// conflict. Above infinity's pattern if no magnitude does.
template <class Format>
typename Format::Bits lowest_magnitude(float threshold) {
  uint32_t below = 0, reached = Format::kInfinity + 1u;  // NaN is reached by nothing
  while (reached - below > 1) {
    const uint32_t middle = (below + reached) / 2;
    const bool reaches = float_of(Format::widen((typename Format::Bits)middle)) >= threshold;
    (reaches ? reached : below) = middle;
  }
  return (typename Format::Bits)reached;
}

template <class From, class To>
CONDU_INLINED inline typename To::Bits convert(typename From::Bits bits) {
  if constexpr (std::is_same_v<From, To>) return bits;
  return To::narrow(From::widen(bits));
}

// All by integers of the formats' own widths: patterns with the sign cleared, and the sign. The
// product of the values would underflow, and a NaN, whose pattern is above infinity's, conflicts
// with nothing.
template <class Reference, class Current, bool kToReference>
CONDU_INLINED inline int64_t align(typename Current::Bits* __restrict__ current,
                                   const typename Reference::Bits* __restrict__ reference,
                                   int64_t elements, typename Reference::Bits lowest_bits) {
  using G = typename Reference::Signed;
  using W = typename Current::Signed;
  const G lowest = (G)lowest_bits;
  int64_t conflicts = 0;
  for (int64_t start = 0; start < elements; start += kBlock) {
    const int64_t end = elements - start < kBlock ? elements : start + kBlock;
    W hits = 0;
    for (int64_t j = start; j < end; ++j) {
      const G g = (G)reference[j];
      const W w = (W)current[j];
      const G g_magnitude = (G)(g & Reference::kMagnitude);
      const W w_magnitude = (W)(w & Current::kMagnitude);
      const bool conflict = (g_magnitude >= lowest) & (g_magnitude <= (G)Reference::kInfinity) &
                            (w_magnitude > 0) & (w_magnitude <= (W)Current::kInfinity) &
                            ((g < 0) != (w < 0));
      const W all = (W)-conflict;
      W value = 0;
      if (kToReference) value = (W)convert<Reference, Current>(reference[j]);
      current[j] = (typename Current::Bits)((value & all) | (w & ~all));
      hits = (W)(hits + conflict);
    }
    conflicts += hits;
  }
  return conflicts;
}

template <class Reference, class Current>
CONDU_INLINED inline void average(typename Reference::Bits* __restrict__ reference,
                                  const typename Current::Bits* __restrict__ current,
                                  int64_t elements, double weight) {
  const float keeping = (float)weight, adding = (float)(1.0 - weight);
  for (int64_t j = 0; j < elements; ++j) {
    const float kept = keeping * float_of(Reference::widen(reference[j]));
    const float added = adding * float_of(Current::widen(current[j]));
    reference[j] = Reference::narrow(bits_of(kept + added));
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
} catch (const std::bad_alloc&) {
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
        with_vectors(vectors,
                     [&]() CONDU_INLINED { average<G, W>(g_at, w_at, share.elements, weight); });
      });
    });
  });
  return CONDU_OK;
}
