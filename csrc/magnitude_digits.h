// The radix search for the r-th largest magnitude: which digits of its pattern are found in turn,
// by the CPU and by the GPU.
//
// The 31 bits of a magnitude in fp32 are found from the top. Each stage counts, among the values
// that share the bits found so far, how often each next digit occurs, and walks down from the
// largest digit. Counts are integers, so the result depends on no order.
#pragma once
#include "formats.h"

struct Stage {
  int shift, bits;
};

enum { kStages = 3, kDigits = 2048 };  // digits of the first and widest stage
constexpr Stage kStage[kStages] = {{20, 11}, {10, 10}, {0, 10}};

// Values of 16-bit formats are zero in the digits of the last stage.
constexpr int kStagesOf16Bits = 2;

// Digits of the first stage that only infinity and NaN have.
constexpr int kFirstNonFinite = Float32::kInfinity >> 20;
