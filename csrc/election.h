// The election at one element, written once for every instruction set and for the GPU.
//
// A lane type V holds one float (GPU, scalar) or many (SIMD); M is the matching mask type. Both
// come with the few operations used here: above_zero, below_zero, either, both, complement,
// sign_where (-0 where the mask is set, else +0), flip (exclusive or with such a sign), keep (value
// where the mask is set, else +0).
//
// Source: ConDU (arXiv 2503.10705), section "model fusion": elect a sign, take the extreme value
// that agrees with it. What a zero sum elects is FusionRule.zero_sum.
#pragma once

#ifdef __CUDACC__
#define CONDU_RULE __host__ __device__ __forceinline__
#else
#define CONDU_RULE inline __attribute__((always_inline))
#endif

template <class V, class M>
struct Flag {
  V sign;   // -0 where minus was elected, else +0
  M valid;  // a sign was elected; used under zero_sum="zero" alone, where a tie elects none
};

// `tie_is_negative` has all bits set if a zero sum elects minus.
template <class V, class M>
static CONDU_RULE Flag<V, M> elect(V total, M tie_is_negative) {
  const M above = above_zero(total), below = below_zero(total);
  return {sign_where(either(below, both(complement(above), tie_is_negative))),
          either(above, below)};
}

// A value seen from the elected side: positive if it agrees, never positive where none is elected.
template <bool kTiesElectNothing, class V, class M>
static CONDU_RULE V agreeing(V value, Flag<V, M> flag) {
  const V seen = flip(value, flag.sign);
  return kTiesElectNothing ? keep(flag.valid, seen) : seen;
}

// The elected value from the largest agreeing magnitude; +0 where nothing agreed.
template <class V, class M>
static CONDU_RULE V elected(V magnitude, Flag<V, M> flag) {
  return keep(above_zero(magnitude), flip(magnitude, flag.sign));
}
