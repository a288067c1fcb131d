// Decouple: out = base + rescaler * (mask, u) for one task, into tensors anywhere in memory.
#include "cuda/launch.cuh"

namespace {

struct Decouple {
  Work work;  // models: the tensors to write, then the base
  int has_base;
  const void* u;
  const uint8_t* plane;
  const float* rescaler;  // [tensors]
};

// Writes the elements of an octet that exist.
template <int kKind>
CONDU_DEVICE void store_octet(Stream out, int at, int end, const float* v) {
  const Seat<Part<kKind>::kWide> seat;
  if constexpr (kKind == CONDU_GENERAL) {
    char* const data = const_cast<char*>(out.data);
    for (int j = 0; j < 8; ++j) {
      const int i = at + seat.quad(0) + j;
      if (i >= end) return;
      if (out.dtype == CONDU_F32) {
        ((float*)data)[i] = v[j];
      } else {
        ((uint16_t*)data)[i] =
            (uint16_t)(out.dtype == CONDU_BF16 ? pack_bf16(v[j], 0.0f) : pack_f16(v[j], 0.0f));
      }
    }
  } else {
    for (int p = 0; p < 2 / Part<kKind>::kQuads; ++p) {
      const int i = at + seat.quad(p);
      if (i >= end) continue;
      uint32_t word[4];
      for (int w = 0; w < 4; ++w) {
        if (kKind == CONDU_ALL_F32) {
          word[w] = __float_as_uint(v[4 * p + w]);
        } else if (kKind == CONDU_ALL_BF16) {
          word[w] = pack_bf16(v[2 * w], v[2 * w + 1]);
        } else {
          word[w] = pack_f16(v[2 * w], v[2 * w + 1]);
        }
      }
      const int size = kKind == CONDU_ALL_F32 ? 4 : 2;
      __stcs((uint4*)(const_cast<char*>(out.data) + size * i),
             make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
}

template <int kKind, bool kBf16>
__global__ void __launch_bounds__(kThreads, 4) decouple_kernel(Decouple a) {
  constexpr bool kWide = Part<kKind>::kWide;
  constexpr int kFlight = kKind == CONDU_GENERAL ? 1 : 2;  // octets that are loaded together
  const Tile tile(a.work);
  if (tile.empty()) return;
  const int end = tile.chunk.elements;
  const Stream out = stream_of(a.work, 0, tile.chunk);
  const Stream base = base_of(a.work, 1, a.has_base, tile.chunk);
  const uint8_t* const plane = a.plane + tile.chunk.arena / 8;
  const float rescaler = a.rescaler[tile.chunk.tensor];

#pragma unroll 1
  for (int k = 0; k < kOctets; k += kFlight) {
    if (tile.run(k) >= tile.padded) break;
    Octet<kKind> theta_0[kFlight];
    RawUnified<kWide, kBf16> raw[kFlight];
    uint32_t byte[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = tile.run(k + i);
      if (at >= tile.padded) continue;
      if (base.data) theta_0[i].load(base, at, end);
      raw[i].load(a.u, tile.chunk.arena + at);
      byte[i] = load_bytes<kWide, 1>(&plane, 1, at / 8).word[0];
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = tile.run(k + i);
      if (at >= tile.padded) continue;
      const uint32_t mask = swap_nibbles<kWide>(byte[i]);
      float u[8], v[8];
      raw[i].unpack(u);
      for (int q = 0; q < 2; ++q) {
        unpack_base(theta_0[i].of(q), base, q % theta_0[i].kQuads, v + 4 * q);
      }
      for (int j = 0; j < 8; ++j) {
        const float moved = __fadd_rn(v[j], __fmul_rn(rescaler, u[j]));
        v[j] = mask >> j & 1 ? moved : v[j];
      }
      store_octet<kKind>(out, at, end, v);
    }
  }
}

template <int kKind>
void (*kernel_for(bool bf16))(Decouple) {
  return bf16 ? decouple_kernel<kKind, true> : decouple_kernel<kKind, false>;
}

}  // namespace

extern "C" int condu_cuda_decouple(const condu_place* place, const condu_work* work,
                                   const condu_state* expert, int has_base) {
  if (expert->tasks != 1) return CONDU_BAD_ARGUMENT;
  const OnDevice device(place->device);
  CONDU_TRY(condu_cuda_status(device.error));
  return for_kinds(work, [&](int kind, int64_t blocks, Work part) {
    static void (*(*const kernels[CONDU_KINDS])(bool))(Decouple) = {
        kernel_for<CONDU_ALL_F32>, kernel_for<CONDU_ALL_BF16>, kernel_for<CONDU_ALL_F16>,
        kernel_for<CONDU_GENERAL>};
    return launch(place, kernels[kind](expert->dtype == CONDU_BF16), blocks, 0,
                  Decouple{part, has_base, expert->u, expert->planes[0], expert->rescaler});
  });
}
