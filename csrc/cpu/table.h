// The kernels of one instruction set. Each isa_*.cpp includes this after its lanes.
#pragma once
#include "cpu/absorb.h"
#include "cpu/decouple.h"
#include "cpu/unify.h"

// A file that defines CONDU_ONE_KIND trades a switch per load for a quarter of the code.
#ifdef CONDU_ONE_KIND
#define CONDU_KIND(kind) kMixed
#else
#define CONDU_KIND(kind) kind
#endif

#define CONDU_OF_KIND(chunk, kind) {chunk<CONDU_KIND(kind), false>, chunk<CONDU_KIND(kind), true>}
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
