// Work is dealt out in chunks, in contiguous runs of equal element counts, the same way on every
// call, so that a thread meets the memory it touched first. Sums go to fixed places (by chunk), so
// nothing depends on the number of threads.
#pragma once
#include <new>
#include <exception>
#include <stdlib.h>
#include <vector>

#include "cpu/floating_point.h"
#include "cpu/memory.h"

namespace condu {
namespace {

constexpr int64_t kChunk = CONDU_CHUNK;

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

struct Chunk {
  int64_t tensor, start, elements, id;
  int thread;
};

// Calls work(chunk) for every chunk of the layout, from `threads` threads.
template <class Work>
void for_chunks(const condu_layout* layout, int threads, Work work) {
  const int64_t elements = elements_of(layout);
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
    finish_streaming();
  }
}

// Per-thread memory, allocated before the threads start so that failure is one status.
class Workspaces {
 public:
  // `eights` of old tasks, `lines` of mask bits, `models` that are read at once.
  Workspaces(int threads, int rows, int eights, int lines, int models) {
    size_t end = 0;
    const auto part = [&end](size_t bytes) {
      const size_t start = end;
      end += (bytes + kLine - 1) / kLine * kLine;
      return start;
    };
    steps_ = part(sizeof(float) * rows * kSteps * kLanes);
    lanes_ = part(sizeof(double) * rows * kLanes);
    total_ = part(sizeof(double) * rows);
    tables_ = part(sizeof(float) * eights * 64);
    turned_ = part((size_t)eights * kBlock);
    lines_ = part((size_t)lines * kLine);
    padded_ = part((size_t)(models + 1) * kStep * 4);
    models_at_ = part(sizeof(Stream) * models);
    ends_ = part(sizeof(Stream) * models);
    stride_ = end + kLine;  // so that two threads' parts never share a line
    if (posix_memalign(&memory_, kLine, stride_ * threads)) throw std::bad_alloc();
  }
  ~Workspaces() { free(memory_); }
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  Workspace of(int thread) const {
    char* mine = (char*)memory_ + stride_ * thread;
    return {(float*)(mine + steps_),  (double*)(mine + lanes_), (double*)(mine + total_),
            (float*)(mine + tables_), mine + turned_,           (uint8_t*)(mine + lines_),
            mine + padded_,           (Stream*)(mine + ends_)};
  }
  Stream* models(int thread) const {
    return (Stream*)((char*)memory_ + stride_ * thread + models_at_);
  }

 private:
  void* memory_ = nullptr;
  size_t steps_, lanes_, total_, tables_, turned_, lines_, padded_, models_at_, ends_, stride_;
};

int eights_of(int tasks) { return (tasks + 7) / 8; }

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

Stream stream_at(const condu_model* model, const Chunk& c) {
  if (!model) return {nullptr, CONDU_F32};
  const uint8_t dtype = model->dtype[c.tensor];
  return {(const char*)model->data[c.tensor] + c.start * size_of(dtype), dtype};
}

const void* arena_at(const void* u, uint8_t dtype, int64_t element) {
  return (const char*)u + element * size_of(dtype);
}

void* arena_at(void* u, uint8_t dtype, int64_t element) {
  return (char*)u + element * size_of(dtype);
}

int kind_of(const Stream* streams, int count, Stream base) {
  const uint8_t first = streams[0].dtype;
  if (first > CONDU_F16 || (base.data && base.dtype != first)) return kMixed;
  for (int i = 1; i < count; ++i) {
    if (streams[i].dtype != first) return kMixed;
  }
  return first;
}

}  // namespace
}  // namespace condu
