// Sums of |u'| over the mask bits of sixteen tasks at once, for many tasks: lane t is task t.
//
// The direct way costs nine instructions a task for a step's 64 elements. Here the four elements
// that one lane of a step adds, (l + (l + 16)) + ((l + 32) + (l + 48)), have sixteen possible sums;
// a table of them costs five instructions, and one permutation by the tasks' four bits looks up
// sixteen tasks. The sums and their order are those of sums.h; only the layout differs:
// [step][lane l][task] in place of [task][step][lane l].
#pragma once
#include "cpu/sums.h"

#define CONDU_SIXTEENS

namespace condu {
namespace {

CONDU_INLINE int in_sixteens(int tasks) { return tasks / 16 * 16; }

// Of eight tasks in 64-bit lanes: nibble l is made of the bits l, l + 16, l + 32, l + 48, for l < 8
// the low half of byte l, otherwise the high half of byte l - 8.
CONDU_INLINE __m512i bits_by_lane(__m512i planes) {
  const __m512i by_word = _mm512_set4_epi32(0x080a0c0e, 0x090b0d0f, 0x00020406, 0x01030507);
  const __m512i units = _mm512_set1_epi64((int64_t)0x8040201008040201);
  return _mm512_gf2p8affine_epi64_epi8(units, _mm512_shuffle_epi8(planes, by_word), 0);
}

CONDU_INLINE void add_sixteens(const Turned* turned, int tasks, int64_t row, int s,
                               const Lanes* size, Workspace work) {
  alignas(64) float terms[kVectors][kLanes];
  __m512 table[kLanes];
  for (int v = 0; v < kVectors; ++v) store_f32(terms[v], size[v]);
  asm("" : "+m"(terms));  // or gcc broadcasts from registers, by way of the port that permutes
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    const __m512 low = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(terms[0][l]));
    const __m512 high = _mm512_maskz_mov_ps(0xf0f0, _mm512_set1_ps(terms[2][l]));
    table[l] = _mm512_add_ps(_mm512_mask_add_ps(low, 0xcccc, low, _mm512_set1_ps(terms[1][l])),
                             _mm512_mask_add_ps(high, 0xff00, high, _mm512_set1_ps(terms[3][l])));
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int first = 0; first < tasks; first += 16, turned += 2) {
    float* sums = work.steps + (row + first) * kSteps * kLanes + s * kLanes * 16;
    const __m512i a = bits_by_lane(turned[0].step[s]), b = bits_by_lane(turned[1].step[s]);
    const __m512i bits[2] = {_mm512_permutex2var_epi32(a, even, b),
                             _mm512_permutex2var_epi32(a, odd, b)};
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      const int shift = 8 * (l % 4) + 4 * (l / 8);
      const __m512i i = _mm512_srli_epi32(bits[l / 4 % 2], (unsigned)shift);
      _mm512_store_ps(sums + l * 16, _mm512_permutexvar_ps(i, table[l]));
    }
  }
}

CONDU_INLINE void end_block_sixteens(Workspace work, int first, int last) {
  for (int row = first; row < last; row += 16) {
    for (int l = 0; l < kLanes; ++l) {
      const float* sums = work.steps + row * kSteps * kLanes + l * 16;
      constexpr int kNext = kLanes * 16;  // the next step's
      const Lanes low = (load_f32(sums) + load_f32(sums + kNext)) +
                        (load_f32(sums + 2 * kNext) + load_f32(sums + 3 * kNext));
      const Lanes high = (load_f32(sums + 4 * kNext) + load_f32(sums + 5 * kNext)) +
                         (load_f32(sums + 6 * kNext) + load_f32(sums + 7 * kNext));
      add_to_double(work.lanes + row * kLanes + l * 16, low + high);
    }
  }
}

CONDU_INLINE void end_chunk_sixteens(Workspace work, int first, int last) {
  for (int row = first; row < last; row += 16) {
    for (int t = 0; t < 16; ++t) {
      double total = 0;
      for (int l = 0; l < kLanes; ++l) total += work.lanes[row * kLanes + l * 16 + t];
      work.total[row + t] = total;
    }
  }
}

}  // namespace
}  // namespace condu
