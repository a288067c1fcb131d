// The operations that election.h names, for one element of one thread.
#pragma once

#define CONDU_DEVICE static __device__ __forceinline__

CONDU_DEVICE bool above_zero(float a) { return a > 0.0f; }
CONDU_DEVICE bool below_zero(float a) { return a < 0.0f; }
CONDU_DEVICE bool either(bool a, bool b) { return a | b; }
CONDU_DEVICE float negate_unless(float a, float sign) {
  return __int_as_float(__float_as_int(a) ^ (~__float_as_int(sign) & (int)0x80000000));
}
CONDU_DEVICE float without_negative_zero(float a) { return __fadd_rn(a, 0.0f); }
CONDU_DEVICE float keep(bool m, float a) { return m ? a : 0.0f; }

#include "election.h"

typedef Flag<float, bool> Elected;

// Shifts the bit of above_zero(a) into a word from below. Only a positive `a` makes 0 - a negative
// (0 - -0 is +0), so this is an addition and a funnel shift, where a comparison would take a select
// and two more operations of the pipe that is busiest.
CONDU_DEVICE uint32_t append_above_zero(uint32_t word, float a) {
  return __funnelshift_l(__float_as_uint(__fsub_rn(0.0f, a)), word, 1);
}
