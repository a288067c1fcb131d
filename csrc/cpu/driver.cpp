// The CPU side of the C interface: cuts tensors into chunks, shares them among threads, and calls
// the kernels of the instruction set in use.
//
// Chunks are dealt out in contiguous runs of equal element counts, the same way on every call, so
// that a thread meets the memory it touched first. Sums go to fixed places (by chunk), so nothing
// depends on the number of threads.
#include <new>
#include <stdlib.h>
#include <string.h>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace condu {
namespace {

// ---- instruction set ---------------------------------------------------------------------------

const Kernels* choose_kernels() {
  const char* wanted = getenv("CONDU_CPU_ISA");
  const bool any = !wanted || !*wanted;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (any || !strcmp(wanted, "avx512"))) return &kAvx512Kernels;
  if (avx2 && (any || !strcmp(wanted, "avx2"))) return &kAvx2Kernels;
#endif
  if (any || !strcmp(wanted, "baseline")) return &kBaselineKernels;
  return nullptr;
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose_kernels();
  return chosen;
}

// Round to nearest and keep subnormals, whatever the process has set, while in scope.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    uint64_t standard = 0;
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(standard));
  }
  ~DefaultFloatingPoint() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// ---- chunks ------------------------------------------------------------------------------------

constexpr int64_t kChunk = CONDU_CHUNK;

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

struct Chunk {
  int64_t tensor, start, elements, id;
  int thread;
};

// Calls work(chunk) for every chunk of the layout, from `threads` threads.
template <class Work>
void for_chunks(const condu_layout* layout, int threads, Work work) {
  int64_t elements = 0;
  for (int64_t k = 0; k < layout->tensors; ++k) elements += layout->numel[k];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const DefaultFloatingPoint scope;
    // Not elements * thread / threads, which could overflow.
    const int64_t share = elements / threads + 1;
    const int64_t from = share * thread, to = from + share;
    int64_t seen = 0, id = 0;
    for (int64_t k = 0; k < layout->tensors && seen < to; ++k) {
      const int64_t numel = layout->numel[k];
      for (int64_t start = 0; start < numel; start += kChunk, ++id) {
        if (seen + start < from || seen + start >= to) continue;
        const int64_t rest = numel - start;
        work(Chunk{k, start, rest < kChunk ? rest : kChunk, id, thread});
      }
      seen += numel;
    }
  }
}

// Per-thread buffers, allocated before the threads start so that failure is one status.
class Scratch {
 public:
  Scratch(int threads, int rows) : rows_(rows) {
    stride_ = (size_t)rows * 17 * sizeof(double) / 64 * 64 + 128;
    if (posix_memalign(&memory_, 64, stride_ * threads)) throw std::bad_alloc();
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Accumulators sums(int thread) const {
    double* lanes = (double*)((char*)memory_ + stride_ * thread);
    return {lanes, lanes + 16 * rows_};
  }

 private:
  void* memory_ = nullptr;
  size_t rows_, stride_;
};

// A state's rescalers, task by task for one tensor, as the kernels want them.
class Rescalers {
 public:
  Rescalers(const condu_layout* layout, const condu_state* state)
      : by_tensor_((size_t)layout->tensors * state->tasks), tasks_(state->tasks) {
    for (int64_t k = 0; k < layout->tensors; ++k) {
      for (int32_t t = 0; t < tasks_; ++t) {
        by_tensor_[k * tasks_ + t] = state->rescaler[t * layout->tensors + k];
      }
    }
  }
  const float* of(int64_t tensor) const { return by_tensor_.data() + tensor * tasks_; }

 private:
  std::vector<float> by_tensor_;
  int32_t tasks_;
};

size_t item(uint8_t dtype) {
  return dtype == CONDU_F32 || dtype == CONDU_F32_VIA_BF16 || dtype == CONDU_F32_VIA_F16 ? 4 : 2;
}

Stream stream_at(const condu_model* model, const Chunk& c) {
  if (!model) return {nullptr, CONDU_F32};
  const uint8_t dtype = model->dtype[c.tensor];
  return {(const char*)model->data[c.tensor] + c.start * item(dtype), dtype};
}

const void* arena_at(const void* u, uint8_t dtype, int64_t element) {
  return (const char*)u + element * (int64_t)item(dtype);
}

void* arena_at(void* u, uint8_t dtype, int64_t element) {
  return (char*)u + element * (int64_t)item(dtype);
}

int kind_of(const Stream* streams, int count, Stream base) {
  const uint8_t first = streams[0].dtype;
  if (first > CONDU_F16 || (base.data && base.dtype != first)) return kMixed;
  for (int i = 1; i < count; ++i) {
    if (streams[i].dtype != first) return kMixed;
  }
  return first;
}

// Fewer page faults for memory that the kernels touch first; only a hint.
void expect_large(void* start, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t huge = (uintptr_t)2 << 20;
  const uintptr_t from = ((uintptr_t)start + huge - 1) / huge * huge;
  const uintptr_t to = ((uintptr_t)start + bytes) / huge * huge;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

void expect_large(const condu_layout* layout, const condu_output* out, int first, int tasks) {
  if (!layout->tensors) return;
  const int64_t last = layout->tensors - 1;
  const int64_t elements = layout->offset[last] + layout->numel[last];
  expect_large(out->u, elements * (int64_t)item(out->dtype));
  for (int t = first; t < tasks; ++t) expect_large(out->planes[t], elements / 8);
}

// ---- checks of what would crash; everything else is checked in Python ---------------------------

bool state_dtype(uint8_t dtype) { return dtype == CONDU_F32 || dtype == CONDU_BF16; }

int check_layout(const condu_layout* layout, int threads) {
  if (!layout || (layout->tensors && (!layout->numel || !layout->offset))) {
    return CONDU_NULL_POINTER;
  }
  if (layout->tensors < 0 || threads < 1) return CONDU_BAD_ARGUMENT;
  for (int64_t k = 0; k < layout->tensors; ++k) {
    if (layout->numel[k] < 0 || layout->offset[k] < 0 || layout->offset[k] % CONDU_ALIGN) {
      return CONDU_BAD_ARGUMENT;
    }
  }
  return kernels() ? CONDU_OK : CONDU_BAD_ARGUMENT;
}

int check_tensors(const condu_layout* layout, const void* const* data, const uint8_t* dtype,
                  uint8_t last) {
  for (int64_t k = 0; k < layout->tensors; ++k) {
    if (!layout->numel[k]) continue;
    if (!data || !dtype || !data[k]) return CONDU_NULL_POINTER;
    if (dtype[k] > last) return CONDU_BAD_ARGUMENT;
  }
  return CONDU_OK;
}

int check_model(const condu_layout* layout, const condu_model* model) {
  return check_tensors(layout, model->data, model->dtype, CONDU_F16_VIA_BF16);
}

int check_planes(const condu_layout* layout, const void* u, uint8_t dtype,
                 const uint8_t* const* planes, int tasks) {
  if (!state_dtype(dtype) || tasks < 0) return CONDU_BAD_ARGUMENT;
  bool empty = true;
  for (int64_t k = 0; k < layout->tensors; ++k) empty = empty && !layout->numel[k];
  if (empty) return CONDU_OK;
  if (!u || (tasks && !planes)) return CONDU_NULL_POINTER;
  for (int t = 0; t < tasks; ++t) {
    if (!planes[t]) return CONDU_NULL_POINTER;
  }
  return CONDU_OK;
}

int check_state(const condu_layout* layout, const condu_state* state) {
  if (!state || (state->tasks && layout->tensors && !state->rescaler)) return CONDU_NULL_POINTER;
  return check_planes(layout, state->u, state->dtype, state->planes, state->tasks);
}

// Runs the checks in turn; the first that fails is the answer.
#define CONDU_CHECK(status) \
  if (int failed = (status)) return failed

}  // namespace
}  // namespace condu

using namespace condu;

extern "C" {

const char* condu_cpu_isa(void) { return kernels() ? kernels()->name : nullptr; }

int64_t condu_chunks(const condu_layout* layout) {
  int64_t chunks = 0;
  for (int64_t k = 0; k < layout->tensors; ++k) chunks += chunks_of(layout->numel[k]);
  return chunks;
}

void condu_add_chunks(const condu_layout* layout, int64_t rows, const double* chunk_sums,
                      double* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < layout->tensors; ++k) {
      double total = 0;
      for (int64_t c = chunks_of(layout->numel[k]); c > 0; --c) total += *chunk_sums++;
      *sums++ = total;
    }
  }
}

int condu_unify(const condu_layout* layout, int32_t tasks, const condu_model* models,
                const condu_model* base, int zero_sum, const condu_output* out, int threads) try {
  CONDU_CHECK(check_layout(layout, threads));
  if (tasks < 1 || !models) return CONDU_BAD_ARGUMENT;
  CONDU_CHECK(check_planes(layout, out->u, out->dtype, out->planes, tasks));
  for (int t = 0; t < tasks; ++t) CONDU_CHECK(check_model(layout, models + t));
  if (base) CONDU_CHECK(check_model(layout, base));

  const int64_t chunks = condu_chunks(layout);
  const Scratch scratch(threads, 2 * tasks);
  std::vector<Stream> streams((size_t)threads * tasks);
  expect_large(layout, out, 0, tasks);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    Stream* mine = streams.data() + (size_t)c.thread * tasks;
    for (int t = 0; t < tasks; ++t) mine[t] = stream_at(models + t, c);
    const Stream start = stream_at(base, c);
    const Accumulators sums = scratch.sums(c.thread);
    const bool bf16 = out->dtype == CONDU_BF16;
    kernels()->unify[kind_of(mine, tasks, start)][bf16]({c.elements, at / 8, tasks, mine, start,
                                                         zero_sum, arena_at(out->u, out->dtype, at),
                                                         out->planes, sums});
    for (int t = 0; t < tasks; ++t) {
      out->num[t * chunks + c.id] = sums.total[t];
      out->den[t * chunks + c.id] = sums.total[tasks + t];
    }
  });
  return CONDU_OK;
} catch (const std::bad_alloc&) {
  return CONDU_NO_MEMORY;
}

int condu_absorb(const condu_layout* layout, const condu_state* old, const condu_model* model,
                 const condu_model* base, int zero_sum, const condu_output* out, int threads) try {
  CONDU_CHECK(check_layout(layout, threads));
  CONDU_CHECK(check_state(layout, old));
  CONDU_CHECK(check_planes(layout, out->u, out->dtype, out->planes, old->tasks + 1));
  CONDU_CHECK(check_model(layout, model));
  if (base) CONDU_CHECK(check_model(layout, base));
  if (out->dtype != old->dtype) return CONDU_BAD_ARGUMENT;

  const int T = old->tasks;
  const int64_t chunks = condu_chunks(layout);
  const Scratch scratch(threads, T + 2);
  const Rescalers rescalers(layout, old);
  if (out->u != old->u) expect_large(layout, out, 0, T + 1);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    const Stream theta = stream_at(model, c), start = stream_at(base, c);
    const Accumulators sums = scratch.sums(c.thread);
    const bool bf16 = out->dtype == CONDU_BF16;
    kernels()->absorb[kind_of(&theta, 1, start)][bf16]({c.elements,
                                                        at / 8,
                                                        {old->planes, rescalers.of(c.tensor), T},
                                                        arena_at(old->u, old->dtype, at),
                                                        theta,
                                                        start,
                                                        zero_sum,
                                                        arena_at(out->u, out->dtype, at),
                                                        out->planes,
                                                        sums});
    for (int t = 0; t <= T; ++t) out->den[t * chunks + c.id] = sums.total[t];
    out->num[c.id] = sums.total[T + 1];
  });
  return CONDU_OK;
} catch (const std::bad_alloc&) {
  return CONDU_NO_MEMORY;
}

int condu_merge(const condu_layout* layout, const condu_state* a, const condu_state* b,
                int zero_sum, const condu_output* out, int threads) try {
  CONDU_CHECK(check_layout(layout, threads));
  CONDU_CHECK(check_state(layout, a));
  CONDU_CHECK(check_state(layout, b));
  const int tasks = a->tasks + b->tasks;
  CONDU_CHECK(check_planes(layout, out->u, out->dtype, out->planes, tasks));
  if (a->dtype != b->dtype || out->dtype != a->dtype) return CONDU_BAD_ARGUMENT;

  const int64_t chunks = condu_chunks(layout);
  const Scratch scratch(threads, tasks);
  const Rescalers rescalers_a(layout, a), rescalers_b(layout, b);
  expect_large(layout, out, 0, tasks);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    const Accumulators sums = scratch.sums(c.thread);
    kernels()->merge[out->dtype == CONDU_BF16]({c.elements,
                                                at / 8,
                                                {a->planes, rescalers_a.of(c.tensor), a->tasks},
                                                {b->planes, rescalers_b.of(c.tensor), b->tasks},
                                                arena_at(a->u, a->dtype, at),
                                                arena_at(b->u, b->dtype, at),
                                                zero_sum,
                                                arena_at(out->u, out->dtype, at),
                                                out->planes,
                                                sums});
    for (int t = 0; t < tasks; ++t) out->den[t * chunks + c.id] = sums.total[t];
  });
  return CONDU_OK;
} catch (const std::bad_alloc&) {
  return CONDU_NO_MEMORY;
}

int condu_decouple(const condu_layout* layout, const condu_state* expert, const condu_model* base,
                   void* const* out, const uint8_t* out_dtype, int threads) {
  CONDU_CHECK(check_layout(layout, threads));
  CONDU_CHECK(check_state(layout, expert));
  if (expert->tasks != 1) return CONDU_BAD_ARGUMENT;
  if (base) CONDU_CHECK(check_model(layout, base));
  CONDU_CHECK(check_tensors(layout, out, out_dtype, CONDU_F16));

  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    const uint8_t dtype = out_dtype[c.tensor];
    void* target = (char*)out[c.tensor] + c.start * item(dtype);
    const Stream start = stream_at(base, c), written = {target, dtype};
    const bool bf16 = expert->dtype == CONDU_BF16;
    kernels()->decouple[kind_of(&written, 1, start)][bf16](
        {c.elements, arena_at(expert->u, expert->dtype, at), expert->planes[0] + at / 8,
         expert->rescaler[c.tensor], start, target, dtype});
  });
  return CONDU_OK;
}

int condu_measure(const condu_layout* layout, const condu_model* model, const condu_model* base,
                  double* num, int threads) try {
  CONDU_CHECK(check_layout(layout, threads));
  CONDU_CHECK(check_model(layout, model));
  if (base) CONDU_CHECK(check_model(layout, base));
  const Scratch scratch(threads, 1);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const Accumulators sums = scratch.sums(c.thread);
    kernels()->measure({c.elements, stream_at(model, c), stream_at(base, c), sums});
    num[c.id] = sums.total[0];
  });
  return CONDU_OK;
} catch (const std::bad_alloc&) {
  return CONDU_NO_MEMORY;
}

}  // extern "C"
