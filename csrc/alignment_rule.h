// Aligned merging at one element, written once for every instruction set and for the GPU.
//
// Source: PAM (arXiv 2506.03189). g is a weight of the reference, w the current one.
#pragma once
#include "formats.h"

// The smallest magnitude of a format, other than zero, that reaches the threshold: zeros never
// conflict. Above infinity's pattern if no magnitude does, which is so for a NaN.
template <class Format>
CONDU_FORMAT typename Format::Bits lowest_magnitude(float threshold) {
  using Bits = typename Format::Bits;
  const uint32_t bits = bits_of(threshold);
  if ((bits & Float32::kMagnitude) > Float32::kInfinity) return (Bits)(Format::kInfinity + 1);
  if (bits == 0 || bits > Float32::kMagnitude) return 1;
  const Bits nearest = Format::narrow(bits);
  return (Bits)(nearest + (Format::widen(nearest) < bits));
}

// Whether |g| reaches `lowest` and the signs conflict, by integers of the formats' own widths: the
// product of the values would underflow. A NaN, whose pattern is above infinity's, conflicts with
// nothing.
template <class G, class W>
CONDU_FORMAT bool in_conflict(typename G::Bits g, typename W::Bits w, typename G::Bits lowest) {
  using SignedG = typename G::Signed;
  using SignedW = typename W::Signed;
  const SignedG g_magnitude = (SignedG)(g & G::kMagnitude);
  const SignedW w_magnitude = (SignedW)(w & W::kMagnitude);
  return (g_magnitude >= (SignedG)lowest) & (g_magnitude <= (SignedG)G::kInfinity) &
         (w_magnitude > 0) & (w_magnitude <= (SignedW)W::kInfinity) &
         (((SignedG)g < 0) != ((SignedW)w < 0));
}

template <class From, class To>
struct Converted {
  CONDU_FORMAT typename To::Bits of(typename From::Bits bits) {
    return To::narrow(From::widen(bits));
  }
};
template <class Format>
struct Converted<Format, Format> {
  CONDU_FORMAT typename Format::Bits of(typename Format::Bits bits) { return bits; }
};

// The share of each side, in fp32.
struct Shares {
  float reference, current;
};

CONDU_FORMAT Shares shares_of(double weight) { return {(float)weight, (float)(1.0 - weight)}; }

// Each product and the sum rounded to fp32; the build forbids contraction to FMA.
CONDU_FORMAT uint32_t averaged(uint32_t g, uint32_t w, Shares shares) {
  const float kept = shares.reference * float_of(g);
  const float added = shares.current * float_of(w);
  return bits_of(kept + added);
}
