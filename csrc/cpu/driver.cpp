// The CPU side of the C interface: cuts tensors into chunks, shares them among threads, and calls
// the kernels of the instruction set in use.
#include "cpu/checks.h"
#include "cpu/chunks.h"

using namespace condu;

extern "C" {

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
  const Workspaces work(threads, 2 * tasks, 0, tasks, tasks);
  const bool past = past_cache(layout) && on_lines(out, tasks), bf16 = out->dtype == CONDU_BF16;
  expect_large(layout, out, tasks);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    Stream* mine = work.models(c.thread);
    for (int t = 0; t < tasks; ++t) mine[t] = stream_at(models + t, c);
    const Stream start = stream_at(base, c);
    const UnifyChunk chunk{c.elements,  at / 8,           tasks, mine,
                           start,       zero_sum,         past,  arena_at(out->u, out->dtype, at),
                           out->planes, work.of(c.thread)};
    kernels()->unify[kind_of(mine, tasks, start)][bf16](chunk);
    for (int t = 0; t < tasks; ++t) {
      out->num[t * chunks + c.id] = chunk.work.total[t];
      out->den[t * chunks + c.id] = chunk.work.total[tasks + t];
    }
  });
  return CONDU_OK;
} catch (const std::exception&) {
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
  const Workspaces work(threads, T + 2, eights_of(T), 2 + 8 * eights_of(T), 1);
  const Rescalers rescalers(layout, old);
  // In place, the lines to store are in the caches already.
  const bool apart = out->u != old->u, bf16 = out->dtype == CONDU_BF16;
  const bool past = apart && past_cache(layout) && on_lines(out, T + 1);
  if (apart) expect_large(layout, out, T + 1);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    const Stream theta = stream_at(model, c), start = stream_at(base, c);
    const AbsorbChunk chunk{c.elements,
                            at / 8,
                            {old->planes, rescalers.of(c.tensor), T},
                            arena_at(old->u, old->dtype, at),
                            theta,
                            start,
                            zero_sum,
                            past,
                            arena_at(out->u, out->dtype, at),
                            out->planes,
                            work.of(c.thread)};
    kernels()->absorb[kind_of(&theta, 1, start)][bf16](chunk);
    for (int t = 0; t <= T; ++t) out->den[t * chunks + c.id] = chunk.work.total[t];
    out->num[c.id] = chunk.work.total[T + 1];
  });
  return CONDU_OK;
} catch (const std::exception&) {
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
  const int eights = eights_of(a->tasks) + eights_of(b->tasks);
  const Workspaces work(threads, tasks, eights, 2 + 8 * eights, 0);
  const Rescalers rescalers_a(layout, a), rescalers_b(layout, b);
  const bool past = past_cache(layout) && on_lines(out, tasks), bf16 = out->dtype == CONDU_BF16;
  expect_large(layout, out, tasks);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    const MergeChunk chunk{c.elements,
                           at / 8,
                           {a->planes, rescalers_a.of(c.tensor), a->tasks},
                           {b->planes, rescalers_b.of(c.tensor), b->tasks},
                           arena_at(a->u, a->dtype, at),
                           arena_at(b->u, b->dtype, at),
                           zero_sum,
                           past,
                           arena_at(out->u, out->dtype, at),
                           out->planes,
                           work.of(c.thread)};
    kernels()->merge[bf16](chunk);
    for (int t = 0; t < tasks; ++t) out->den[t * chunks + c.id] = chunk.work.total[t];
  });
  return CONDU_OK;
} catch (const std::exception&) {
  return CONDU_NO_MEMORY;
}

int condu_decouple(const condu_layout* layout, const condu_state* expert, const condu_model* base,
                   void* const* out, const uint8_t* out_dtype, int threads) {
  CONDU_CHECK(check_layout(layout, threads));
  CONDU_CHECK(check_state(layout, expert));
  if (expert->tasks != 1) return CONDU_BAD_ARGUMENT;
  if (base) CONDU_CHECK(check_model(layout, base));
  CONDU_CHECK(check_tensors(layout, out, out_dtype, CONDU_F16));

  const bool large = past_cache(layout), bf16 = expert->dtype == CONDU_BF16;
  for_chunks(layout, threads, [&](const Chunk& c) {
    const int64_t at = layout->offset[c.tensor] + c.start;
    const uint8_t dtype = out_dtype[c.tensor];
    void* target = (char*)out[c.tensor] + c.start * size_of(dtype);
    const Stream start = stream_at(base, c), written = {target, dtype};
    kernels()->decouple[kind_of(&written, 1, start)][bf16](
        {c.elements, arena_at(expert->u, expert->dtype, at), expert->planes[0] + at / 8,
         expert->rescaler[c.tensor], start, large && on_line(target), target, dtype});
  });
  return CONDU_OK;
}

int condu_measure(const condu_layout* layout, const condu_model* model, const condu_model* base,
                  double* num, int threads) try {
  CONDU_CHECK(check_layout(layout, threads));
  CONDU_CHECK(check_model(layout, model));
  if (base) CONDU_CHECK(check_model(layout, base));
  const Workspaces work(threads, 1, 0, 0, 1);
  for_chunks(layout, threads, [&](const Chunk& c) {
    const MeasureChunk chunk{c.elements, stream_at(model, c), stream_at(base, c),
                             work.of(c.thread)};
    kernels()->measure(chunk);
    num[c.id] = chunk.work.total[0];
  });
  return CONDU_OK;
} catch (const std::exception&) {
  return CONDU_NO_MEMORY;
}

}  // extern "C"
