// The election at one element, written once for every instruction set and for the GPU.
//
// A lane type V holds one float (GPU, scalar) or many (SIMD); M is the matching mask type. Both
// come with the few operations used here: -, above_zero, below_zero, either, keep (value where the
// mask is set, else +0), negate_unless (value, negated unless the sign bit of a second one is set)
// and without_negative_zero (+0 in place of -0).
//
// Source: ConDU (arXiv 2503.10705), section "model fusion": elect a sign, take the extreme value
// that agrees with it. What a zero sum elects is FusionRule.zero_sum.
#pragma once

#ifdef __CUDACC__
#define CONDU_RULE __host__ __device__ __forceinline__
#else
#define CONDU_RULE inline __attribute__((always_inline))
#endif

// What a zero sum elects, as `elect` wants it: zero for minus, the smallest negative number for
// plus.
static CONDU_RULE float tie_for(int elects_minus) { return elects_minus ? 0.0f : -0x1p-149f; }

template <class V, class M>
struct Flag {
  V opposite;  // its sign bit is set where plus was elected
  M valid;     // a sign was elected; used under zero_sum="zero" alone, where a tie elects none
};

// tie - total has its sign bit set where plus is elected: where total > 0, and where a total of
// either zero meets a tie below zero. Exact for subnormals too. No comparison, so no mask register:
// on SIMD the election is one subtraction.
template <class V>
static CONDU_RULE auto elect(V total, V tie) -> Flag<V, decltype(above_zero(total))> {
  return {tie - total, either(below_zero(total), above_zero(total))};
}

// A value seen from the elected side: positive if it agrees, never positive where none is elected.
template <bool kTiesElectNothing, class V, class M>
static CONDU_RULE V agreeing(V value, Flag<V, M> flag) {
  const V seen = negate_unless(value, flag.opposite);
  return kTiesElectNothing ? keep(flag.valid, seen) : seen;
}

// The elected value from the largest agreeing magnitude; +0 where nothing agreed.
template <class V, class M>
static CONDU_RULE V elected(V magnitude, Flag<V, M> flag) {
  return without_negative_zero(negate_unless(magnitude, flag.opposite));
}
