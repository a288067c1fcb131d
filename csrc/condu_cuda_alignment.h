// C interface of aligned merging on CUDA (see alignment.h for what is computed). Tables, places and
// statuses are those of condu_cuda.h: every pointer to data is a device pointer, and nothing here
// synchronises or allocates.
#pragma once
#include "condu_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of workspace for the thresholds of so many groups: the tensors, or one for all of them.
int64_t condu_cuda_threshold_workspace(int64_t groups);

// The models of the work are the reference. ranks[groups], threshold[groups].
int condu_cuda_magnitude_threshold(const struct condu_place* place, const struct condu_work* work,
                                   int joint, const int64_t* ranks, float* threshold);

// The models of the work are the current adapter, which is written, then the reference.
// threshold[tensors]. *conflicts grows by the number of elements that were changed.
int condu_cuda_align(const struct condu_place* place, const struct condu_work* work,
                     const float* threshold, int to_reference, uint64_t* conflicts);

// The models of the work are the reference, which is written, then the current adapter.
int condu_cuda_average(const struct condu_place* place, const struct condu_work* work,
                       double weight);

#ifdef __cplusplus
}
#endif
