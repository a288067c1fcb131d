// C interface of aligned merging (PAM, arXiv 2506.03189): raw pointers, 64-bit sizes, a status.
//
// Two adapters are compared element by element: the *reference* (the global one) and the *current*
// one (the temporary one that is being fine-tuned). The dtype of a tensor is CONDU_F32, CONDU_BF16
// or CONDU_F16 (condu_ext.h) and may differ between the two.
#pragma once
#include "condu_ext.h"

#ifdef __cplusplus
extern "C" {
#endif

// An adapter: its tensors, anywhere in memory, each contiguous.
struct condu_adapter {
  int64_t tensors;
  const int64_t* numel;  // [tensors]
  void* const* data;     // [tensors]
  const uint8_t* dtype;  // [tensors]
};

// The ranks[k]-th largest magnitude of tensor k, exactly: threshold[tensors]. With one rank and
// many tensors (`joint`), of all tensors taken together: threshold[1]. Rank 0 gives +infinity,
// which nothing finite reaches; NaN or infinity among the values gives NaN.
int condu_magnitude_threshold(const struct condu_adapter* reference, int joint,
                              const int64_t* ranks, float* threshold, int threads);

// Where |reference| >= threshold[k] and the signs conflict, current becomes +0, or the reference
// rounded to its dtype. Zeros and NaN have no sign. *conflicts: how many elements were changed.
int condu_align(const struct condu_adapter* current, const struct condu_adapter* reference,
                const float* threshold, int to_reference, int64_t* conflicts, int threads);

// reference = weight * reference + (1 - weight) * current. Both factors are rounded to fp32 once
// (1 - weight is formed in fp64), both products and the sum are rounded to fp32, and the sum then
// to the reference's dtype.
int condu_average(const struct condu_adapter* reference, const struct condu_adapter* current,
                  double weight, int threads);

#ifdef __cplusplus
}
#endif
