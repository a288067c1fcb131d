// The kernels of one instruction set. Each isa_*.cpp includes this after its lanes.
#pragma once
#include "cpu/absorb.h"
#include "cpu/decouple.h"
#include "cpu/unify.h"

#define CONDU_OF_KIND(chunk, kind) {chunk<kind, false>, chunk<kind, true>}
#define CONDU_BY_KIND(chunk)                                          \
  {CONDU_OF_KIND(chunk, CONDU_F32), CONDU_OF_KIND(chunk, CONDU_BF16), \
   CONDU_OF_KIND(chunk, CONDU_F16), CONDU_OF_KIND(chunk, kMixed)}

#define CONDU_KERNELS(name)                 \
  {name,                                    \
   CONDU_BY_KIND(unify_chunk),              \
   CONDU_BY_KIND(absorb_chunk),             \
   CONDU_BY_KIND(decouple_chunk),           \
   {merge_chunk<false>, merge_chunk<true>}, \
   measure_chunk}
