// Python's view of alignment.h: addresses, sizes and dtypes as NumPy arrays, a status as an
// exception. condu_ext/_alignment_native.py has checked the tensors.
#include <stdexcept>
#include <string>

#include "alignment.h"
#include "bindings.h"

namespace {

struct Adapter {
  Adapter(const Array<int64_t>& numel, const Addresses& data, const Array<uint8_t>& dtype)
      : view{numel.size(), numel.data(), pointers<void* const*>(data), dtype.data()} {
    if (data.size() != numel.size() || dtype.size() != numel.size()) {
      throw std::invalid_argument("sizes, addresses and dtypes of an adapter differ in number");
    }
  }
  condu_adapter view;
};

}  // namespace

void bind_alignment(py::module_& m) {
  m.def("magnitude_threshold",
        [](const Array<int64_t>& numel, const Addresses& data, const Array<uint8_t>& dtype,
           const Array<int64_t>& ranks, bool joint, int threads) {
          const Adapter reference(numel, data, dtype);
          if (ranks.size() != (joint ? 1 : numel.size())) {
            throw std::invalid_argument("one rank a tensor, or one for all");
          }
          Array<float> threshold(ranks.size());
          float* out = threshold.mutable_data();
          int status;
          {
            py::gil_scoped_release release;
            status = condu_magnitude_threshold(&reference.view, joint, ranks.data(), out, threads);
          }
          raise_for(status, "magnitude_threshold");
          return threshold;
        });

  m.def("align", [](const Array<int64_t>& numel, const Addresses& current_data,
                    const Array<uint8_t>& current_dtype, const Addresses& reference_data,
                    const Array<uint8_t>& reference_dtype, const Array<float>& threshold,
                    bool to_reference, int threads) {
    const Adapter current(numel, current_data, current_dtype);
    const Adapter reference(numel, reference_data, reference_dtype);
    if (threshold.size() != numel.size()) throw std::invalid_argument("one threshold a tensor");
    int64_t conflicts = 0;
    int status;
    {
      py::gil_scoped_release release;
      status = condu_align(&current.view, &reference.view, threshold.data(), to_reference,
                           &conflicts, threads);
    }
    raise_for(status, "align");
    return conflicts;
  });

  m.def("average", [](const Array<int64_t>& numel, const Addresses& reference_data,
                      const Array<uint8_t>& reference_dtype, const Addresses& current_data,
                      const Array<uint8_t>& current_dtype, double weight, int threads) {
    const Adapter reference(numel, reference_data, reference_dtype);
    const Adapter current(numel, current_data, current_dtype);
    int status;
    {
      py::gil_scoped_release release;
      status = condu_average(&reference.view, &current.view, weight, threads);
    }
    raise_for(status, "average");
  });
}
