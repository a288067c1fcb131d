// Cycles per 16 elements of the CPU kernels, on one thread and data that stays in the second-level
// cache: what the instructions cost when memory does not count.
//
//   g++ -O2 -std=c++17 -fopenmp -I csrc benchmarks/lab/cycles.cpp build/temp*/[a-z]*.o ...
// (benchmarks/lab/README.md has the whole command). CONDU_CPU_ISA picks the instruction set.
//
// The core's clock is measured beside each run by a chain of dependent additions, one a cycle.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "condu_ext.h"

namespace {

constexpr int64_t kElements = 32768;

double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double cycle() {
  constexpr int kAdditions = 200000;
  const double start = seconds();
  long x = 0;
  for (int i = 0; i < kAdditions; ++i) asm volatile("add $1, %0" : "+r"(x));
  return (seconds() - start) / kAdditions;
}

// The lowest of many runs: whatever else the machine does only adds.
double cycles_per_16(const std::function<void()>& call) {
  double best = INFINITY;
  for (int run = 0; run < 300; ++run) {
    const double clock = cycle(), start = seconds();
    call();
    best = std::min(best, (seconds() - start) / std::min(clock, cycle()));
  }
  return best / ((double)kElements / 16);
}

struct Arrays {
  explicit Arrays(int item) : item(item) {}
  void* fresh(int64_t bytes) {
    void* p = aligned_alloc(4096, (size_t)(bytes + 4095) / 4096 * 4096);
    memset(p, 0, (size_t)bytes);
    return p;
  }
  // Small random values in the model's dtype.
  void* values() {
    void* p = fresh(kElements * item);
    for (int64_t i = 0; i < kElements; ++i) {
      const float x = (float)(rand() % 2001 - 1000) / 65536;
      uint32_t bits;
      memcpy(&bits, &x, 4);
      if (item == 4) memcpy((char*)p + 4 * i, &bits, 4);
      if (item == 2) memcpy((char*)p + 2 * i, (char*)&bits + 2, 2);
    }
    return p;
  }
  uint8_t* bits() {
    uint8_t* p = (uint8_t*)fresh(kElements / 8);
    for (int64_t i = 0; i < kElements / 8; ++i) p[i] = (uint8_t)rand();
    return p;
  }
  int item;
};

}  // namespace

int main() {
  const int64_t numel = kElements, offset = 0;
  const condu_layout layout = {1, &numel, &offset};
  printf("%s, cycles per 16 elements\n", condu_cpu_isa());
  for (const uint8_t dtype : {CONDU_F32, CONDU_BF16}) {
    Arrays make(dtype == CONDU_F32 ? 4 : 2), wide(4);
    const char* name = dtype == CONDU_F32 ? "fp32" : "bf16";
    const void* base_data = make.values();
    const condu_model base = {&base_data, &dtype};
    for (const int T : {1, 2, 4, 8, 16, 32}) {
      std::vector<const void*> data;
      std::vector<condu_model> models;
      std::vector<const uint8_t*> old_planes;
      std::vector<uint8_t*> planes;
      std::vector<float> rescaler;
      for (int t = 0; t <= T; ++t) data.push_back(make.values());
      for (int t = 0; t <= T; ++t) models.push_back({&data[t], &dtype});
      for (int t = 0; t < T; ++t) old_planes.push_back(make.bits());
      for (int t = 0; t <= T; ++t) planes.push_back(make.bits());
      for (int t = 0; t < T; ++t) rescaler.push_back(1.0f + 0.01f * (float)t);
      std::vector<double> num((size_t)T + 1), den((size_t)T + 1);
      const condu_state state = {wide.values(), CONDU_F32, T, old_planes.data(), rescaler.data()};
      const condu_output out = {wide.values(), CONDU_F32, planes.data(), num.data(), den.data()};
      const double unify = cycles_per_16(
          [&] { condu_unify(&layout, T, models.data(), &base, CONDU_NEGATIVE, &out, 1); });
      const double absorb = cycles_per_16(
          [&] { condu_absorb(&layout, &state, &models[T], &base, CONDU_NEGATIVE, &out, 1); });
      printf("%s T=%-2d  unify %6.1f  absorb %6.1f\n", name, T, unify, absorb);
    }
    const float one = 1;
    const uint8_t* plane = make.bits();
    const condu_state expert = {wide.values(), CONDU_F32, 1, &plane, &one};
    void* target = make.values();
    const double decouple =
        cycles_per_16([&] { condu_decouple(&layout, &expert, &base, &target, &dtype, 1); });
    printf("%s       decouple %6.1f\n", name, decouple);
  }
}
