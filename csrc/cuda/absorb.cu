// Absorb: decouple every task of a state and unify them with one more model, without writing a
// decoupled delta. Of the old tasks an element needs S and X alone (triggers.cuh).
//
// Up to eight tasks a thread keeps its mask bytes and does everything in one look. More tasks'
// masks are read again, from the caches, once it is known which bits stay.
#include "cuda/triggers.cuh"

namespace {

struct Absorb {
  Work work;
  Workspace space;
  State old;
  int has_base, zero_sum;
  void* u;
  uint8_t* const* planes;
};

// Shared memory of a block: sums, the state, planes to write from the chunk on.
template <bool kFew>
struct Shared {
  WarpSums sums;
  Triggers<kFew> old;
  uint8_t** planes;
  static size_t bytes(int old_tasks) {
    return WarpSums::bytes(old_tasks + 2) + Triggers<kFew>::bytes(old_tasks) +
           (old_tasks + 1) * sizeof(uint8_t*);
  }
  __device__ __forceinline__ Shared(const Absorb& a, const Tile& tile)
      : sums{(double*)shared_memory, a.old.tasks + 2},
        old(shared_memory + WarpSums::bytes(a.old.tasks + 2), a.old, tile.chunk, a.work.tensors),
        planes(old.planes + a.old.tasks) {
    sums.clear();
    for (int t = threadIdx.x; t <= a.old.tasks; t += kThreads) {
      planes[t] = a.planes[t] + tile.chunk.arena / 8;
    }
    __syncthreads();
  }
};

// What the new model does to an octet.
struct Joined {
  uint32_t kept = 0;    // bits of the elements whose old tasks stay
  uint32_t joined = 0;  // the new task's mask
  float u[8];
  __device__ __forceinline__ Joined(const float* old, const Gathered& of, const float* d,
                                    int zero_sum) {
    Elected flag[8];
    for (int j = 7; j >= 0; --j) {
      const float total = __fadd_rn(__fmul_rn(old[j], of.S[j]), d[j]);
      flag[j] = elect(total, tie_for(zero_sum == CONDU_NEGATIVE));
      const float before = agreeing<false>(old[j], flag[j]), now = agreeing<false>(d[j], flag[j]);
      const float best = fmaxf(now, fmaxf(__fmul_rn(before, of.X[j]), 0.0f));
      kept = append_above_zero(kept, before);
      joined = append_above_zero(joined, now);
      u[j] = elected(best, flag[j]);
    }
    if (zero_sum == CONDU_ZERO) {
      const uint32_t counts = clear_ties(flag, u);
      kept &= counts;
      joined &= counts;
    }
  }
};

// What an octet is made of, as loaded.
template <int kKind, bool kBf16>
struct Inputs {
  enum { kWide = Part<kKind>::kWide };
  Octet<kKind> theta, theta_0;
  RawUnified<kWide, kBf16> old;
  __device__ __forceinline__ void load(const Absorb& a, const Tile& tile, Stream model, Stream base,
                                       int at) {
    theta.load(model, at, tile.chunk.elements);
    if (base.data) theta_0.load(base, at, tile.chunk.elements);
    old.load(a.old.u, tile.chunk.arena + at);
  }
  __device__ __forceinline__ void unpack(Stream model, Stream base, float* d, float* u) const {
    for (int q = 0; q < 2; ++q) {
      float start[4];
      unpack_base(theta_0.of(q), base, q % theta.kQuads, start);
      delta(theta.of(q), model, q % theta.kQuads, start, d + 4 * q);
    }
    old.unpack(u);
  }
};

CONDU_DEVICE double sum_of_octet(const float* d) {
  return __dadd_rn(sum_of_magnitudes(d), sum_of_magnitudes(d + 4));
}

template <int kKind, bool kBf16>
__global__ void __launch_bounds__(kThreads, 2) absorb_few(Absorb a) {
  typedef Inputs<kKind, kBf16> In;
  constexpr bool kWide = In::kWide;
  // Octets that are loaded together: as many as the registers hold on every architecture.
  constexpr int kFlight = kKind != CONDU_GENERAL && kBf16 ? 2 : 1;
  const Tile tile(a.work);
  if (tile.empty()) return;
  const Shared<true> s(a, tile);
  const int T = a.old.tasks;
  const Stream model = stream_of(a.work, 0, tile.chunk);
  const Stream base = base_of(a.work, 1, a.has_base, tile.chunk);
  double den[8] = {}, own[8] = {};  // own: den and num of the new task

#pragma unroll 1
  for (int k = 0; k < kOctets; k += kFlight) {
    if (tile.run(k) >= tile.padded) break;
    In in[kFlight];
    MaskBytes masks[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = tile.run(k + i);
      if (at >= tile.padded) continue;
      in[i].load(a, tile, model, base, at);
      masks[i] = load_bytes<kWide>(s.old.planes, T, at / 8);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = tile.run(k + i);
      if (at >= tile.padded) continue;
      float d[8], u[8];
      in[i].unpack(model, base, d, u);
      masks[i].template swap<kWide>();
      Joined next(u, look_up(s.old, masks[i]), d, a.zero_sum);
      store_unified<kWide, kBf16>(a.u, tile.chunk.arena + at, next.u);
      masks[i].keep_only(next.kept);
      store_masks<kWide>(s.planes, T, at / 8, masks[i]);
      store_masks<kWide, 1>(s.planes + T, 1, at / 8, {{next.joined, 0}});
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        if (t < T) den[t] = __dadd_rn(den[t], sum_where(masks[i].of(t), next.u));
      }
      own[0] = __dadd_rn(own[0], sum_where(next.joined, next.u));
      own[1] = __dadd_rn(own[1], sum_of_octet(d));
    }
  }
  s.sums.add(0, T, den);
  s.sums.add(T, 2, own);
  s.sums.store(a.space, tile);
}

template <int kKind, bool kBf16>
__global__ void __launch_bounds__(kThreads, 3) absorb_many(Absorb a) {
  typedef Inputs<kKind, kBf16> In;
  constexpr bool kWide = In::kWide;
  const Tile tile(a.work);
  if (tile.empty()) return;
  const Shared<false> s(a, tile);
  const int T = a.old.tasks;
  const Stream model = stream_of(a.work, 0, tile.chunk);
  const Stream base = base_of(a.work, 1, a.has_base, tile.chunk);

#pragma unroll 1
  for (int k = 0; k < kOctets; ++k) {
    const int at = tile.run(k);
    if (at >= tile.padded) break;
    In in;
    in.load(a, tile, model, base, at);
    const Gathered gathered = gather<kWide>(s.old, at / 8);
    float d[8], u[8];
    in.unpack(model, base, d, u);
    Joined next(u, gathered, d, a.zero_sum);
    store_unified<kWide, kBf16>(a.u, tile.chunk.arena + at, next.u);
    store_masks<kWide, 1>(s.planes + T, 1, at / 8, {{next.joined, 0}});
    double own[8] = {sum_where(next.joined, next.u), sum_of_octet(d)};
    s.sums.add(T, 2, own);
    confirm<kWide>(s.old, at / 8, next.kept, next.u, s.planes, s.sums, 0);
  }
  s.sums.store(a.space, tile);
}

template <int kKind>
void (*kernel_for(bool bf16, bool few))(Absorb) {
  if (few) return bf16 ? absorb_few<kKind, true> : absorb_few<kKind, false>;
  return bf16 ? absorb_many<kKind, true> : absorb_many<kKind, false>;
}

}  // namespace

extern "C" int condu_cuda_absorb(const condu_place* place, const condu_work* work,
                                 const condu_state* old, int has_base, int zero_sum, void* u,
                                 uint8_t* const* planes, double* sums) {
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  const int tasks = old->tasks;
  const bool few = tasks <= 8, bf16 = old->dtype == CONDU_BF16;
  const Workspace space(place, chunks_of(work), tasks + 2);
  CONDU_TRY(copy_planes(place, space.planes, old->planes, tasks));
  CONDU_TRY(copy_planes(place, space.planes + tasks, planes, tasks + 1));
  const State state = {old->u, old->rescaler, space.planes, tasks};
  CONDU_TRY(for_kinds(work, [&](int kind, int64_t blocks, Work part) {
    static void (*(*const kernels[CONDU_KINDS])(bool, bool))(Absorb) = {
        kernel_for<CONDU_ALL_F32>, kernel_for<CONDU_ALL_BF16>, kernel_for<CONDU_ALL_F16>,
        kernel_for<CONDU_GENERAL>};
    const size_t shared = few ? Shared<true>::bytes(tasks) : Shared<false>::bytes(tasks);
    return launch(place, kernels[kind](bf16, few), blocks, shared,
                  Absorb{part, space, state, has_base, zero_sum, u, space.planes + tasks});
  }));
  return add_tiles(place, work, space, sums);
}
