// Cycles per 16 elements of the CPU kernels, on one thread and data that stays in the second-level
// cache: what the instructions cost when memory does not count.
//
// benchmarks/lab/README.md has the command. CONDU_CPU_ISA picks the instruction set.
//
// The core's clock is measured beside each run by a chain of dependent additions, one a cycle.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "condu_ext.h"

namespace {

constexpr int64_t kElements = 16384;

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

struct Case {
  std::string name;
  std::function<void()> call;
  std::vector<double> cycles;
};

// Runs are spread over time and the tenth percentile counts: whatever else the machine does (a
// neighbour on the same core halves the speed) adds, but it may also meet the clock's measurement.
void measure(std::vector<Case>& cases) {
  for (int round = 0; round < 60; ++round) {
    for (Case& c : cases) {
      for (int run = 0; run < 10; ++run) {
        const double before = cycle(), start = seconds();
        c.call();
        const double taken = seconds() - start;
        c.cycles.push_back(taken / std::min(before, cycle()));
      }
    }
  }
  for (Case& c : cases) {
    std::sort(c.cycles.begin(), c.cycles.end());
    printf("%-14s %6.1f\n", c.name.c_str(), c.cycles[c.cycles.size() / 10] / (kElements / 16.0));
  }
}

struct Arrays {
  explicit Arrays(int item) : item(item) {}
  void* fresh(int64_t bytes) const {
    void* p = aligned_alloc(4096, (size_t)(bytes + 4095) / 4096 * 4096);
    memset(p, 0, (size_t)bytes);
    return p;
  }
  // Small random values in the model's dtype.
  void* values() const {
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
  uint8_t* bits() const {
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
  const uint8_t dtypes[] = {CONDU_F32, CONDU_BF16};
  const int most = 32;
  const Arrays wide(4);
  const void* const u = wide.values();
  void* const new_u = wide.values();
  std::vector<const uint8_t*> old_planes;
  std::vector<uint8_t*> planes;
  for (int t = 0; t <= most; ++t) old_planes.push_back(wide.bits());
  for (int t = 0; t <= most; ++t) planes.push_back(wide.bits());
  const std::vector<float> rescaler(most, 1.25f);
  std::vector<double> num(most + 1), den(most + 1);
  const condu_output out = {new_u, CONDU_F32, planes.data(), num.data(), den.data()};

  std::vector<Case> cases;
  std::vector<std::vector<const void*>> data(2);
  std::vector<std::vector<condu_model>> models(2);
  for (const int kind : {0, 1}) {
    const Arrays make(kind == 0 ? 4 : 2);
    for (int t = 0; t <= most + 1; ++t) data[kind].push_back(make.values());
    for (const void*& p : data[kind]) models[kind].push_back({&p, &dtypes[kind]});
    const condu_model* const model = models[kind].data();
    const condu_model* const base = model + most + 1;
    const std::string name = kind == 0 ? "fp32 " : "bf16 ";
    for (const int T : {1, 2, 4, 8, 16, 32}) {
      const std::string tasks = " T=" + std::to_string(T);
      cases.push_back({name + "unify" + tasks, [=, &layout, &out] {
                         condu_unify(&layout, T, model, base, CONDU_NEGATIVE, &out, 1);
                       }});
      cases.push_back({name + "absorb" + tasks, [=, &layout, &out, &old_planes, &rescaler] {
                         const condu_state old = {u, CONDU_F32, T, old_planes.data(),
                                                  rescaler.data()};
                         condu_absorb(&layout, &old, model, base, CONDU_NEGATIVE, &out, 1);
                       }});
    }
    void* const target = make.values();
    cases.push_back({name + "decouple", [=, &layout, &old_planes, &rescaler, &dtypes] {
                       const condu_state expert = {u, CONDU_F32, 1, old_planes.data(),
                                                   rescaler.data()};
                       condu_decouple(&layout, &expert, base, &target, &dtypes[kind], 1);
                     }});
  }
  printf("%s, cycles per 16 elements\n", condu_cpu_isa());
  measure(cases);
}
