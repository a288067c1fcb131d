// Enough of CUDA to compile the kernels of csrc/cuda as C++ and run them on the CPU: see
// emulator.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim;

// ---- vectors -----------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

// ---- threads of a block ------------------------------------------------------------------------

void __syncthreads();
uint64_t exchange_in_warp(uint64_t value, int distance);  // the value of thread (lane ^ distance)

template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int distance) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange_in_warp(bits, distance);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- memory, checked for alignment as the hardware would ---------------------------------------

void misaligned(const void* address, size_t size);

template <class T>
static inline T aligned_load(const T* p) {
  if ((uintptr_t)p % sizeof(T)) misaligned(p, sizeof(T));
  return *p;
}
template <class T>
static inline void aligned_store(T* p, T value) {
  if ((uintptr_t)p % sizeof(T)) misaligned(p, sizeof(T));
  *p = value;
}
#define CACHE_KINDS_OF_LOADS(name)   \
  template <class T>                 \
  static inline T name(const T* p) { \
    return aligned_load(p);          \
  }
#define CACHE_KINDS_OF_STORES(name)        \
  template <class T>                       \
  static inline void name(T* p, T value) { \
    aligned_store(p, value);               \
  }
CACHE_KINDS_OF_LOADS(__ldg)
CACHE_KINDS_OF_LOADS(__ldcg)
CACHE_KINDS_OF_LOADS(__ldcs)
CACHE_KINDS_OF_STORES(__stcg)
CACHE_KINDS_OF_STORES(__stcs)

#define __builtin_assume(condition) ((void)(condition))
static inline bool __isGlobal(const void*) { return true; }

// Threads run one at a time, so any addition is atomic.
template <class T>
static inline T atomicAdd(T* p, T value) {
  const T before = aligned_load(p);
  *p = before + value;
  return before;
}

// ---- arithmetic --------------------------------------------------------------------------------

template <class To, class From>
static inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline float __int_as_float(int a) { return same_bits<float>(a); }
static inline int __float_as_int(float a) { return same_bits<int>(a); }
static inline float __uint_as_float(uint32_t a) { return same_bits<float>(a); }
static inline uint32_t __float_as_uint(float a) { return same_bits<uint32_t>(a); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return shift & 31 ? high << (shift & 31) | low >> (32 - (shift & 31)) : high;
}

// ---- host --------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
typedef void* cudaStream_t;

static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid device ordinal";
}
static inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
static inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
static inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

// As on sm_86, 89 and 120, which have the least.
static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 99 * 1024, cudaSuccess;
}
template <class T>
static inline cudaError_t cudaFuncSetAttribute(T*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

void run_grid(void (*body)(const void*), const void* call, unsigned blocks, unsigned threads,
              size_t shared);

template <class Arguments>
struct KernelCall {
  void (*kernel)(Arguments);
  Arguments* arguments;
  static void run(const void* call) {
    const KernelCall* self = (const KernelCall*)call;
    self->kernel(*self->arguments);
  }
};

template <class Arguments>
static inline cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block,
                                           void** arguments, size_t shared, cudaStream_t) {
  const KernelCall<Arguments> call = {kernel, (Arguments*)arguments[0]};
  run_grid(KernelCall<Arguments>::run, &call, grid.x, block.x, shared);
  return cudaSuccess;
}
