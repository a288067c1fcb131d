// Runs a grid of CUDA threads on one CPU thread. Blocks run one after another; the threads of a
// block are fibers, which run until they meet a barrier of their block or an exchange of their warp
// and then make way. So the result of a kernel without races cannot depend on the order of blocks
// and threads: tests run both orders. A barrier that not all threads reach, a misaligned access and
// a write beyond the block's shared memory end the run with an exception.
//
// Shared memory starts as NaNs: nothing may count on zeros.
#include <pybind11/pybind11.h>
#include <ucontext.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim;

namespace {

enum { kShared = 200 * 1024, kGuard = 4096, kStack = 64 * 1024, kWarp = 32 };

bool reversed = false;

enum Wait { kNothing, kWarpExchange, kBlockBarrier, kEnd };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  Wait waits = kNothing;
  uint64_t given = 0, taken = 0;
  int distance = 0;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned current;
void (*body)(const void*);
const void* body_call;
std::exception_ptr failure;

void fiber_main() {
  try {
    body(body_call);
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current].waits = kEnd;
  swapcontext(&fibers[current].context, &scheduler);
}

void wait_for(Wait what) {
  fibers[current].waits = what;
  swapcontext(&fibers[current].context, &scheduler);
}

void resume(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread);
  fibers[thread].waits = kNothing;
  swapcontext(&scheduler, &fibers[thread].context);
  if (failure) std::rethrow_exception(failure);
}

// How many threads of [first, end) wait for this.
unsigned waiting(unsigned first, unsigned end, Wait what) {
  unsigned count = 0;
  for (unsigned t = first; t < end; ++t) count += fibers[t].waits == what;
  return count;
}

void run_range(unsigned first, unsigned end) {
  for (unsigned i = first; i < end; ++i) resume(reversed ? first + end - 1 - i : i);
}

void exchange(unsigned first, unsigned end) {
  for (unsigned t = first; t < end; ++t) {
    fibers[t].taken = fibers[first + ((t - first) ^ fibers[t].distance)].given;
  }
}

void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  run_range(0, threads);
  while (waiting(0, threads, kEnd) < threads) {
    for (unsigned i = 0; i < threads; i += kWarp) {
      const unsigned first = reversed ? threads - kWarp - i : i, end = first + kWarp;
      while (waiting(first, end, kWarpExchange)) {
        if (waiting(first, end, kWarpExchange) < kWarp) {
          throw std::runtime_error("an exchange that not all threads of a warp take part in");
        }
        exchange(first, end);
        run_range(first, end);
      }
    }
    const unsigned stopped = waiting(0, threads, kBlockBarrier);
    if (stopped && stopped < threads) {
      throw std::runtime_error("a barrier that not all threads of a block reach");
    }
    if (stopped) run_range(0, threads);
  }
}

}  // namespace

alignas(16) unsigned char shared_memory[kShared + kGuard];

void __syncthreads() { wait_for(kBlockBarrier); }

uint64_t exchange_in_warp(uint64_t value, int distance) {
  Fiber& fiber = fibers[current];
  fiber.given = value;
  fiber.distance = distance;
  wait_for(kWarpExchange);
  return fiber.taken;
}

void misaligned(const void* address, size_t size) {
  throw std::runtime_error("misaligned access of " + std::to_string(size) + " bytes at " +
                           std::to_string((uintptr_t)address));
}

void run_grid(void (*kernel)(const void*), const void* call, unsigned blocks, unsigned threads,
              size_t shared) {
  if (shared > kShared) throw std::runtime_error("too much shared memory");
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  body = kernel;
  body_call = call;
  failure = nullptr;
  blockDim = dim3(threads);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = dim3(reversed ? blocks - 1 - b : b);
    memset(shared_memory, 0xff, shared + kGuard);
    run_block(threads);
    for (size_t i = shared; i < shared + kGuard; ++i) {
      if (shared_memory[i] != 0xff) throw std::runtime_error("a write beyond shared memory");
    }
  }
}

PYBIND11_MODULE(cuda_on_cpu, m) {
  bind_cuda(m);
  m.def("reverse", [](bool on) { reversed = on; });
}
