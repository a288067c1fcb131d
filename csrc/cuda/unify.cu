// Unify: per element the total of all deltas elects a sign, then every delta is seen again: who
// agrees, who is largest, how much each moved.
//
// Up to 16 tasks the deltas stay in registers between the two looks. More tasks are read again: a
// thread's octets of all tasks lie in the caches by then, so device memory is read once.
#include "cuda/sums.cuh"

namespace {

struct Unify {
  Work work;
  Workspace space;
  int tasks, has_base, zero_sum, bf16;
  void* u;
};

// Shared memory of a block: sums, streams of the models and the base, planes from the chunk on.
template <class Sums>
struct Shared {
  Sums sums;
  Stream* models;
  uint8_t** planes;
  static __host__ __device__ size_t bytes(int tasks) {
    return Sums::bytes(2 * tasks) + (tasks + 1) * sizeof(Stream) + tasks * sizeof(uint8_t*);
  }
};

template <class Sums>
CONDU_DEVICE Shared<Sums> set_up(const Unify& a, const Tile& tile) {
  Shared<Sums> s;
  s.sums = {(double*)shared_memory, 2 * a.tasks};
  s.models = (Stream*)(shared_memory + Sums::bytes(2 * a.tasks));
  s.planes = (uint8_t**)(s.models + a.tasks + 1);
  s.sums.clear();
  for (int t = threadIdx.x; t < a.tasks; t += kThreads) {
    s.models[t] = stream_of(a.work, t, tile.chunk);
    s.planes[t] = a.space.planes[t] + tile.chunk.arena / 8;
  }
  if (threadIdx.x == 0) {
    s.models[a.tasks] = base_of(a.work, a.tasks, a.has_base, tile.chunk);
  }
  __syncthreads();
  return s;
}

// Whose side each element of a quad is on, and the largest agreeing magnitude so far.
struct Election {
  Elected flag[4];
  float best[4];
  uint32_t counts = 0xf;  // bits of the elements at which a sign was elected
  __device__ __forceinline__ Election(const float* total, int zero_sum) {
    for (int j = 0; j < 4; ++j) {
      flag[j] = elect(total[j], tie_for(zero_sum == CONDU_NEGATIVE));
      best[j] = 0.0f;
      if (zero_sum == CONDU_ZERO && !flag[j].valid) counts &= ~(1u << j);
    }
  }
  // Bits of the elements at which a delta is on the elected side.
  __device__ __forceinline__ uint32_t see(const float* d) {
    uint32_t agrees = 0;
    for (int j = 3; j >= 0; --j) {
      const float seen = agreeing<false>(d[j], flag[j]);
      best[j] = fmaxf(seen, best[j]);
      agrees = append_above_zero(agrees, seen);
    }
    return agrees & counts;
  }
  __device__ __forceinline__ void close(float* u) const {
    for (int j = 0; j < 4; ++j) u[j] = elected(keep(counts >> j & 1, best[j]), flag[j]);
  }
};

template <bool kWide>
CONDU_DEVICE void store_result(const Unify& a, int64_t at, float* u) {
  a.bf16 ? store_unified<kWide, true>(a.u, at, u) : store_unified<kWide, false>(a.u, at, u);
}

// What the compiler cannot see through it neither keeps converted nor computes once more.
CONDU_DEVICE void settle(uint32_t& word) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(word));
#else
  (void)word;
#endif
}
CONDU_DEVICE void settle(float& value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(value));
#else
  (void)value;
#endif
}

// At most kCapacity models. The deltas of up to eight stay in registers for the second look, of
// more only the bits, which take half the room.
template <int kKind, int kCapacity>
__global__ void __launch_bounds__(kThreads, kCapacity <= 4 ? 3 : 2) unify_few(Unify a) {
  constexpr int kBatches = (kCapacity + 7) / 8, kMost = kCapacity < 8 ? kCapacity : 8;
  constexpr int kQuads = Part<kKind>::kQuads;
  constexpr bool kWide = Part<kKind>::kWide;
  const Tile tile(a.work);
  if (tile.empty()) return;
  const auto s = set_up<ThreadSums>(a, tile);
  const int T = a.tasks, end = tile.chunk.elements;
  const Stream base = s.models[T];

#pragma unroll 1
  for (int k = 0; k < kOctets; ++k) {
    const int at = tile.run(k);
    if (at >= tile.padded) break;
    MaskBytes masks[kBatches] = {};
    float u[8];
    Part<kKind> theta[kCapacity], theta_0;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (q % kQuads == 0) {
        if (base.data) theta_0.load(base, at, q, end);
#pragma unroll
        for (int t = 0; t < kCapacity; ++t) {
          if (t < T) theta[t].load(s.models[t], at, q, end);
        }
      }
      constexpr bool kHold = kBatches == 1;
      float start[4], total[4], d[kHold ? kCapacity : 1][4];
      unpack_base(theta_0, base, q % kQuads, start);
#pragma unroll
      for (int t = 0; t < kCapacity; ++t) {
        if (t >= T) continue;
        float* own = d[kHold ? t : 0];
        delta(theta[t], {}, q % kQuads, start, own);
        for (int j = 0; j < 4; ++j) {
          total[j] = t ? __fadd_rn(total[j], own[j]) : own[j];
          if (kHold) settle(own[j]);
        }
        if (!kHold) {
          settle(theta[t].bits.x), settle(theta[t].bits.y);
          settle(theta[t].bits.z), settle(theta[t].bits.w);
        }
      }
      Election election(total, a.zero_sum);
      for (int j = 0; j < 4; ++j) settle(election.flag[j].opposite);
#pragma unroll
      for (int t = 0; t < kCapacity; ++t) {
        if (t >= T) continue;
        float* own = d[kHold ? t : 0];
        if (!kHold) delta(theta[t], {}, q % kQuads, start, own);
        masks[t / 8].word[t / 4 % 2] |= election.see(own) << (8 * (t % 4) + 4 * q);
        s.sums.add(t, sum_of_magnitudes(own));
      }
      election.close(u + 4 * q);
    }
    store_result<kWide>(a, tile.chunk.arena + at, u);
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      store_masks<kWide, kMost>(s.planes + 8 * b, T - 8 * b, at / 8, masks[b]);
      for (int t = 0; t < kMost; ++t) {
        if (8 * b + t < T) s.sums.add(T + 8 * b + t, sum_where(masks[b].of(t), u));
      }
    }
  }
  s.sums.store(a.space, tile);
}

template <int kKind>
__global__ void __launch_bounds__(kThreads, 2) unify_many(Unify a) {
  constexpr bool kWide = Part<kKind>::kWide;
  const Tile tile(a.work);
  if (tile.empty()) return;
  const auto s = set_up<WarpSums>(a, tile);
  const int T = a.tasks, end = tile.chunk.elements;
  const Stream base = s.models[T];

#pragma unroll 1
  for (int k = 0; k < kOctets; ++k) {
    const int at = tile.run(k);
    if (at >= tile.padded) break;
    Octet<kKind> theta, theta_0;
    float start[8], total[8], d[8], u[8];
    if (base.data) theta_0.load(base, at, end);
    for (int q = 0; q < 2; ++q) {
      unpack_base(theta_0.of(q), base, q % theta.kQuads, start + 4 * q);
    }
    const auto load_delta = [&](int t) {
      const Stream model = s.models[t];
      theta.load(model, at, end);
      for (int q = 0; q < 2; ++q) {
        delta(theta.of(q), model, q % theta.kQuads, start + 4 * q, d + 4 * q);
      }
    };
#pragma unroll 4
    for (int t = 0; t < T; ++t) {
      load_delta(t);
      for (int j = 0; j < 8; ++j) total[j] = t ? __fadd_rn(total[j], d[j]) : d[j];
    }
    Election election[2] = {{total, a.zero_sum}, {total + 4, a.zero_sum}};
#pragma unroll 1
    for (int b = 0; b < T; b += 8) {
      MaskBytes masks = {};
      double num[8] = {};
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        if (b + t >= T) continue;
        load_delta(b + t);
        for (int q = 0; q < 2; ++q) {
          masks.word[t / 4] |= election[q].see(d + 4 * q) << (8 * (t % 4) + 4 * q);
          num[t] = __dadd_rn(num[t], sum_of_magnitudes(d + 4 * q));
        }
      }
      store_masks<kWide>(s.planes + b, T - b, at / 8, masks);
      s.sums.add(b, T - b, num);
    }
    for (int q = 0; q < 2; ++q) election[q].close(u + 4 * q);
    store_result<kWide>(a, tile.chunk.arena + at, u);
#pragma unroll 1
    for (int b = 0; b < T; b += 8) {
      const MaskBytes masks = load_masks<kWide>(s.planes + b, T - b, at / 8);
      double den[8];
      for (int t = 0; t < 8; ++t) den[t] = sum_where(masks.of(t), u);
      s.sums.add(T + b, T - b, den);
    }
  }
  s.sums.store(a.space, tile);
}

template <int kKind>
auto kernel_for(int tasks) {
  if (kKind == CONDU_GENERAL) return unify_many<kKind>;
  // A general part is too large to hold many of.
  constexpr int kPlain = kKind == CONDU_GENERAL ? CONDU_ALL_F32 : kKind;
  if (tasks <= 2) return unify_few<kPlain, 2>;
  if (tasks <= 4) return unify_few<kPlain, 4>;
  if (tasks <= 8) return unify_few<kPlain, 8>;
  if (tasks <= 16) return unify_few<kPlain, 16>;
  return unify_many<kKind>;
}

}  // namespace

extern "C" int condu_cuda_unify(const condu_place* place, const condu_work* work, int32_t tasks,
                                int has_base, int zero_sum, void* u, uint8_t dtype,
                                uint8_t* const* planes, double* sums) {
  if (tasks < 1) return CONDU_BAD_ARGUMENT;
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  const Workspace space(place, chunks_of(work), 2 * (int64_t)tasks);
  CONDU_TRY(copy_planes(place, space.planes, planes, tasks));
  CONDU_TRY(for_kinds(work, [&](int kind, int64_t blocks, Work part) {
    static void (*(*const kernels[CONDU_KINDS])(int))(Unify) = {
        kernel_for<CONDU_ALL_F32>, kernel_for<CONDU_ALL_BF16>, kernel_for<CONDU_ALL_F16>,
        kernel_for<CONDU_GENERAL>};
    const bool few = tasks <= 16 && kind != CONDU_GENERAL;
    const size_t shared = few ? Shared<ThreadSums>::bytes(tasks) : Shared<WarpSums>::bytes(tasks);
    return launch(place, kernels[kind](tasks), blocks, shared,
                  Unify{part, space, tasks, has_base, zero_sum, dtype == CONDU_BF16, u});
  }));
  return add_tiles(place, work, space, sums);
}
