// Memory bandwidth of the CPU kernels as a fraction of a copy with stores past the caches, kernel
// and copy timed alternately in one process: median of the paired ratios. Outputs are allocated and
// touched beforehand, so page faults do not count.
//
// Usage: bandwidth [threads] [millions of parameters] [pairs] [part of a row's name]; build:
// benchmarks/lab/README.md.
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "condu_ext.h"

namespace {

int threads = 2, pairs = 7;
std::string wanted;
int64_t elements;
char *copy_from, *copy_to;
constexpr int64_t kCopied = (int64_t)512 << 20;

double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Memory on huge pages, first touched by the threads that work on it later.
template <class Fill>
char* filled(int64_t bytes, Fill fill) {
  char* p = (char*)mmap(nullptr, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                        -1, 0);
  if (p == MAP_FAILED) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  madvise(p, (size_t)bytes, MADV_HUGEPAGE);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t page = 0; page < bytes / 4096; ++page) {
    uint64_t seed = (uint64_t)page * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < 4096; i += 4) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      const uint32_t word = fill((uint32_t)(seed >> 32));
      memcpy(p + page * 4096 + i, &word, 4);
    }
  }
  return p;
}

// One fp32 in (-1/8, 1/8), or two 16-bit values (bf16 or fp16).
char* values(uint8_t dtype) {
  if (dtype == CONDU_F32) {
    return filled(4 * elements, [](uint32_t r) {
      const float x = (float)(int32_t)r * 0x1p-34f;
      uint32_t bits;
      memcpy(&bits, &x, 4);
      return bits;
    });
  }
  const uint32_t high = dtype == CONDU_BF16 ? 0x3c003c00 : 0x24002400;
  return filled(2 * elements, [high](uint32_t r) { return (r & 0x80ff80ff) | high; });
}

uint8_t* plane() {
  return (uint8_t*)filled(elements / 8, [](uint32_t r) { return r | (r << 7); });
}

double copy_rate() {
  const double start = seconds();
  condu_copy(copy_to, copy_from, kCopied, threads);
  return 2 * (double)kCopied / (seconds() - start);
}

void report(const std::string& name, double bytes, const std::function<void()>& call) {
  if (name.find(wanted) == std::string::npos) return;
  std::vector<double> ratio, rate, copy;
  call();
  copy_rate();
  for (int p = 0; p < pairs; ++p) {
    const double start = seconds();
    call();
    rate.push_back(bytes / (seconds() - start));
    copy.push_back(copy_rate());
    ratio.push_back(rate.back() / copy.back());
  }
  const auto median = [](std::vector<double>& v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
  };
  const double r = median(ratio);
  printf("%-36s %.2f of the copy  (%.1f GB/s, copy %.1f)\n", name.c_str(), r, median(rate) / 1e9,
         median(copy) / 1e9);
  fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) threads = atoi(argv[1]);
  const int64_t millions = argc > 2 ? atoll(argv[2]) : 128;
  if (argc > 3) pairs = atoi(argv[3]);
  if (argc > 4) wanted = argv[4];
  elements = millions << 20;
  copy_from = filled(kCopied, [](uint32_t r) { return r; });
  copy_to = filled(kCopied, [](uint32_t r) { return r; });
  const int64_t offset = 0;
  const condu_layout layout = {1, &elements, &offset};
  const double n = (double)elements;
  printf("%s, %d threads, %lld Mi parameters\n", condu_cpu_isa(), threads, (long long)millions);

  const char* const names[] = {"fp32", "bf16", "fp16"};
  void *u = values(CONDU_F32), *new_u = values(CONDU_F32);
  for (const uint8_t dtype : {CONDU_F32, CONDU_BF16, CONDU_F16}) {
    const int size = dtype == CONDU_F32 ? 4 : 2;
    const std::string name = names[dtype];
    const int most = dtype == CONDU_F32 ? 16 : 4;
    std::vector<const void*> data;
    std::vector<condu_model> models;
    for (int t = 0; t <= most; ++t) data.push_back(values(dtype));
    for (int t = 0; t <= most; ++t) models.push_back({&data[t], &dtype});
    const condu_model* base = &models[most];
    std::vector<uint8_t*> planes, new_planes;
    for (int t = 0; t < 33; ++t) planes.push_back(plane());
    for (int t = 0; t < 33; ++t) new_planes.push_back(plane());
    std::vector<float> rescaler(33, 1.25f);
    std::vector<double> num((size_t)33 * (n / CONDU_CHUNK + 1)), den = num;

    const condu_state one = {u, CONDU_F32, 1, planes.data(), rescaler.data()};
    void* target = (void*)data[0];
    report("decouple " + name, n * (2 * size + 4 + 0.125),
           [&] { condu_decouple(&layout, &one, base, &target, &dtype, threads); });
    for (const int T : {2, 4, 8, 16}) {
      if (T > most) continue;
      const condu_output out = {new_u, CONDU_F32, new_planes.data(), num.data(), den.data()};
      report("unify " + name + " T=" + std::to_string(T), n * ((T + 1) * size + 4 + T / 8.0),
             [&] { condu_unify(&layout, T, models.data(), base, CONDU_NEGATIVE, &out, threads); });
    }
    for (const int T : {8, 16, 32}) {
      const double bytes = n * (2 * size + 8 + (2 * T + 1) / 8.0);
      const condu_state old = {u, CONDU_F32, T, planes.data(), rescaler.data()};
      const condu_output apart = {new_u, CONDU_F32, new_planes.data(), num.data(), den.data()};
      report("absorb " + name + " T=" + std::to_string(T) + " new state", bytes, [&] {
        condu_absorb(&layout, &old, &models[0], base, CONDU_NEGATIVE, &apart, threads);
      });
      const condu_output same = {u, CONDU_F32, planes.data(), num.data(), den.data()};
      report("absorb " + name + " T=" + std::to_string(T) + " in place", bytes, [&] {
        condu_absorb(&layout, &old, &models[0], base, CONDU_NEGATIVE, &same, threads);
      });
    }
    for (const void* p : data) munmap((void*)p, (size_t)(elements * size));
    for (int t = 0; t < 33; ++t) munmap(planes[t], (size_t)elements / 8);
    for (int t = 0; t < 33; ++t) munmap(new_planes[t], (size_t)elements / 8);
  }
}
