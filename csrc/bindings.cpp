// Python's view of the C interface: addresses and sizes as NumPy arrays, a status as an exception.
// condu_ext/_native.py has checked the tensors behind the addresses.
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "condu_ext.h"

void raise_for(int status, const char* operation) {
  static const char* const kReasons[] = {"", "null pointer", "bad argument", "out of memory"};
  if (status == CONDU_OK) return;
  if (status == CONDU_NO_MEMORY) throw std::bad_alloc();
  if (status == CONDU_BAD_ARGUMENT && !condu_cpu_isa()) {
    throw std::invalid_argument(
        "CONDU_CPU_ISA names no instruction set of this machine: use avx512, avx2 or baseline "
        "(avx512 "
        "is for processors that also have VBMI and GFNI)");
  }
  throw std::runtime_error(std::string(operation) + ": " + kReasons[status]);
}

namespace {

struct Layout {
  Layout(const Array<int64_t>& numel, const Array<int64_t>& offset)
      : view{numel.size(), numel.data(), offset.data()} {
    if (numel.size() != offset.size()) throw std::invalid_argument("numel and offset differ");
  }
  condu_layout view;
};

// `count` models of a layout, from [count, tensors] arrays of addresses and dtypes.
std::vector<condu_model> models(const Layout& layout, const Addresses& data,
                                const Array<uint8_t>& dtype) {
  const int64_t tensors = layout.view.tensors;
  if (data.size() != dtype.size() || (tensors && data.size() % tensors)) {
    throw std::invalid_argument("addresses and dtypes of a model do not fit the layout");
  }
  std::vector<condu_model> result(tensors ? data.size() / tensors : data.shape(0));
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = {pointers<const void* const*>(data) + i * tensors, dtype.data() + i * tensors};
  }
  return result;
}

// A base model, or none.
struct Base {
  Base(const Layout& layout, const std::optional<Addresses>& data,
       const std::optional<Array<uint8_t>>& dtype) {
    if (data) model = models(layout, *data, dtype.value()).at(0);
    present = data.has_value();
  }
  const condu_model* get() const { return present ? &model : nullptr; }
  condu_model model{};
  bool present;
};

struct State {
  State(const Layout& layout, uint64_t u, int dtype, const Addresses& planes,
        const Array<float>& rescaler)
      : view{reinterpret_cast<const void*>(u), (uint8_t)dtype, (int32_t)planes.size(),
             pointers<const uint8_t* const*>(planes), rescaler.data()} {
    if (rescaler.size() != planes.size() * layout.view.tensors) {
      throw std::invalid_argument("rescaler is not [tasks, tensors]");
    }
  }
  condu_state view;
};

condu_output output(uint64_t u, int dtype, const Addresses& planes, Array<double>* num,
                    Array<double>* den) {
  return {reinterpret_cast<void*>(u), (uint8_t)dtype, pointers<uint8_t* const*>(planes),
          num ? num->mutable_data() : nullptr, den ? den->mutable_data() : nullptr};
}

Array<double> sums_for(const Layout& layout, int64_t rows) {
  return Array<double>({rows, condu_chunks(&layout.view)});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Fusion kernels; see csrc/condu_ext.h";
  m.attr("version") = CONDU_VERSION;
#ifdef CONDU_CUDA_ARCHS
  m.attr("cuda_archs") = CONDU_CUDA_ARCHS;
  bind_cuda(m);
#else
  m.attr("cuda_archs") = "";
  m.def("cuda_devices", [] { return 0; });
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("ALIGN") = (int)CONDU_ALIGN;
  m.attr("CHUNK") = (int)CONDU_CHUNK;
  m.def("cpu_isa", [] {
    if (!condu_cpu_isa()) raise_for(CONDU_BAD_ARGUMENT, "cpu_isa");
    return std::string(condu_cpu_isa());
  });

  m.def(
      "unify", [](const Array<int64_t>& numel, const Array<int64_t>& offset, const Addresses& data,
                  const Array<uint8_t>& dtype, const std::optional<Addresses>& base,
                  const std::optional<Array<uint8_t>>& base_dtype, int zero_sum, uint64_t u,
                  int u_dtype, const Addresses& planes, int threads) {
        const Layout layout(numel, offset);
        const std::vector<condu_model> inputs = models(layout, data, dtype);
        if ((int64_t)inputs.size() != planes.size())
          throw std::invalid_argument("one plane a task");
        const Base start(layout, base, base_dtype);
        Array<double> num = sums_for(layout, planes.size()), den = sums_for(layout, planes.size());
        const condu_output out = output(u, u_dtype, planes, &num, &den);
        int status;
        {
          py::gil_scoped_release release;
          status = condu_unify(&layout.view, (int32_t)inputs.size(), inputs.data(), start.get(),
                               zero_sum, &out, threads);
        }
        raise_for(status, "unify");
        return py::make_tuple(num, den);
      });

  m.def("absorb", [](const Array<int64_t>& numel, const Array<int64_t>& offset, uint64_t old_u,
                     int u_dtype, const Addresses& old_planes, const Array<float>& rescaler,
                     const Addresses& data, const Array<uint8_t>& dtype,
                     const std::optional<Addresses>& base,
                     const std::optional<Array<uint8_t>>& base_dtype, int zero_sum, uint64_t u,
                     const Addresses& planes, int threads) {
    const Layout layout(numel, offset);
    const State old(layout, old_u, u_dtype, old_planes, rescaler);
    const condu_model model = models(layout, data, dtype).at(0);
    const Base start(layout, base, base_dtype);
    if (planes.size() != old_planes.size() + 1) throw std::invalid_argument("one plane a task");
    Array<double> num = sums_for(layout, 1), den = sums_for(layout, planes.size());
    const condu_output out = output(u, u_dtype, planes, &num, &den);
    int status;
    {
      py::gil_scoped_release release;
      status = condu_absorb(&layout.view, &old.view, &model, start.get(), zero_sum, &out, threads);
    }
    raise_for(status, "absorb");
    return py::make_tuple(num, den);
  });

  m.def("merge", [](const Array<int64_t>& numel, const Array<int64_t>& offset, uint64_t a_u,
                    const Addresses& a_planes, const Array<float>& a_rescaler, uint64_t b_u,
                    const Addresses& b_planes, const Array<float>& b_rescaler, int zero_sum,
                    uint64_t u, int u_dtype, const Addresses& planes, int threads) {
    const Layout layout(numel, offset);
    const State a(layout, a_u, u_dtype, a_planes, a_rescaler);
    const State b(layout, b_u, u_dtype, b_planes, b_rescaler);
    if (planes.size() != a_planes.size() + b_planes.size()) {
      throw std::invalid_argument("one plane a task");
    }
    Array<double> den = sums_for(layout, planes.size());
    const condu_output out = output(u, u_dtype, planes, nullptr, &den);
    int status;
    {
      py::gil_scoped_release release;
      status = condu_merge(&layout.view, &a.view, &b.view, zero_sum, &out, threads);
    }
    raise_for(status, "merge");
    return den;
  });

  m.def("decouple",
        [](const Array<int64_t>& numel, const Array<int64_t>& offset, uint64_t u, int u_dtype,
           const Addresses& plane, const Array<float>& rescaler,
           const std::optional<Addresses>& base, const std::optional<Array<uint8_t>>& base_dtype,
           const Addresses& out, const Array<uint8_t>& out_dtype, int threads) {
          const Layout layout(numel, offset);
          const State expert(layout, u, u_dtype, plane, rescaler);
          const Base start(layout, base, base_dtype);
          const condu_model target = models(layout, out, out_dtype).at(0);
          int status;
          {
            py::gil_scoped_release release;
            status = condu_decouple(
                &layout.view, &expert.view, start.get(),
                const_cast<void* const*>(reinterpret_cast<const void* const*>(target.data)),
                target.dtype, threads);
          }
          raise_for(status, "decouple");
        });

  m.def("measure",
        [](const Array<int64_t>& numel, const Array<int64_t>& offset, const Addresses& data,
           const Array<uint8_t>& dtype, const std::optional<Addresses>& base,
           const std::optional<Array<uint8_t>>& base_dtype, int threads) {
          const Layout layout(numel, offset);
          const condu_model model = models(layout, data, dtype).at(0);
          const Base start(layout, base, base_dtype);
          Array<double> num = sums_for(layout, 1);
          int status;
          {
            py::gil_scoped_release release;
            status = condu_measure(&layout.view, &model, start.get(), num.mutable_data(), threads);
          }
          raise_for(status, "measure");
          return num;
        });

  m.def("copy", [](uint64_t to, uint64_t from, int64_t bytes, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      status = condu_copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes,
                          threads);
    }
    raise_for(status, "copy");
  });

  m.def("add_chunks", [](const Array<int64_t>& numel, const Array<int64_t>& offset,
                         const Array<double>& chunk_sums) {
    const Layout layout(numel, offset);
    if (chunk_sums.ndim() != 2 || chunk_sums.shape(1) != condu_chunks(&layout.view)) {
      throw std::invalid_argument("chunk sums are not [rows, chunks]");
    }
    Array<double> sums({chunk_sums.shape(0), (py::ssize_t)layout.view.tensors});
    condu_add_chunks(&layout.view, chunk_sums.shape(0), chunk_sums.data(), sums.mutable_data());
    return sums;
  });

  bind_alignment(m);
}
