// Checks of what would crash; everything else is checked in Python.
#pragma once
#include "cpu/kernels.h"

namespace condu {
namespace {

bool state_dtype(uint8_t dtype) { return dtype == CONDU_F32 || dtype == CONDU_BF16; }

int check_layout(const condu_layout* layout, int threads) {
  if (!layout || (layout->tensors && (!layout->numel || !layout->offset))) {
    return CONDU_NULL_POINTER;
  }
  if (layout->tensors < 0 || threads < 1) return CONDU_BAD_ARGUMENT;
  for (int64_t k = 0; k < layout->tensors; ++k) {
    if (layout->numel[k] < 0 || layout->offset[k] < 0 || layout->offset[k] % CONDU_ALIGN) {
      return CONDU_BAD_ARGUMENT;
    }
  }
  return kernels() ? CONDU_OK : CONDU_BAD_ARGUMENT;
}

int check_tensors(const condu_layout* layout, const void* const* data, const uint8_t* dtype,
                  uint8_t last) {
  for (int64_t k = 0; k < layout->tensors; ++k) {
    if (!layout->numel[k]) continue;
    if (!data || !dtype || !data[k]) return CONDU_NULL_POINTER;
    if (dtype[k] > last) return CONDU_BAD_ARGUMENT;
  }
  return CONDU_OK;
}

int check_model(const condu_layout* layout, const condu_model* model) {
  return check_tensors(layout, model->data, model->dtype, CONDU_F16_VIA_BF16);
}

int check_planes(const condu_layout* layout, const void* u, uint8_t dtype,
                 const uint8_t* const* planes, int tasks) {
  if (!state_dtype(dtype) || tasks < 0) return CONDU_BAD_ARGUMENT;
  bool empty = true;
  for (int64_t k = 0; k < layout->tensors; ++k) empty = empty && !layout->numel[k];
  if (empty) return CONDU_OK;
  if (!u || (tasks && !planes)) return CONDU_NULL_POINTER;
  for (int t = 0; t < tasks; ++t) {
    if (!planes[t]) return CONDU_NULL_POINTER;
  }
  return CONDU_OK;
}

int check_state(const condu_layout* layout, const condu_state* state) {
  if (!state || (state->tasks && layout->tensors && !state->rescaler)) return CONDU_NULL_POINTER;
  return check_planes(layout, state->u, state->dtype, state->planes, state->tasks);
}

// Runs the checks in turn; the first that fails is the answer.
#define CONDU_CHECK(status) \
  if (int failed = (status)) return failed

}  // namespace
}  // namespace condu
