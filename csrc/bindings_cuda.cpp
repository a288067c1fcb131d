// Python's view of the CUDA kernels (condu_cuda.h). Addresses
// are those of device memory; condu_ext/_cuda.py and _alignment_cuda.py have checked the tensors.
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "condu_cuda.h"
#include "condu_cuda_alignment.h"

namespace {

void raise_on_cuda(int status, const char* operation) {
  if (status == CONDU_OK) return;
  const char* reason = "bad argument";
  if (status == CONDU_CUDA_FAILED) reason = condu_cuda_error();
  if (status == CONDU_TOO_MANY_TASKS) reason = "too many tasks for this GPU's shared memory";
  throw std::runtime_error(std::string(operation) + " on CUDA: " + reason);
}

template <class Pointer>
Pointer at(uint64_t address) {
  return reinterpret_cast<Pointer>(address);
}

// Where a call runs: device ordinal, stream, workspace.
struct Place {
  Place(int device, uint64_t stream, uint64_t workspace)
      : view{device, at<void*>(stream), at<void*>(workspace)} {}
  condu_place view;
};

// A table on the device: its parts follow one another as condu_ext/_tables.py lays them out.
struct Work {
  Work(uint64_t table, int64_t tensors, int64_t models,
       const std::array<int64_t, CONDU_KINDS>& kinds)
      : view{} {
    int64_t chunks = 0;
    view.tensors = tensors;
    for (int k = 0; k < CONDU_KINDS; ++k) chunks += view.of_kind[k] = kinds[k];
    const uint64_t data = table + chunks * sizeof(condu_chunk);
    view.chunk = at<const condu_chunk*>(table);
    view.data = at<const void* const*>(data);
    view.dtype = at<const uint8_t*>(data + tensors * models * sizeof(void*));
  }
  condu_work view;
};

struct State {
  State(uint64_t u, int dtype, Addresses planes, uint64_t rescaler)
      : planes(std::move(planes)),
        view{at<const void*>(u), (uint8_t)dtype, (int32_t)this->planes.size(),
             pointers<const uint8_t* const*>(this->planes), at<const float*>(rescaler)} {}
  Addresses planes;
  condu_state view;
};

// Calls without the interpreter's lock and turns the status into an exception.
template <class Call>
void run(const char* operation, Call call) {
  int status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  raise_on_cuda(status, operation);
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::class_<Place>(m, "Place").def(py::init<int, uint64_t, uint64_t>());
  py::class_<Work>(m, "Work").def(
      py::init<uint64_t, int64_t, int64_t, const std::array<int64_t, CONDU_KINDS>&>());
  py::class_<State>(m, "State").def(py::init<uint64_t, int, Addresses, uint64_t>());

  m.def("cuda_devices", &condu_cuda_devices, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_workspace", &condu_cuda_workspace);

  m.def("cuda_unify",
        [](const Place& place, const Work& work, int tasks, bool has_base, int zero_sum, uint64_t u,
           int u_dtype, const Addresses& planes, uint64_t sums) {
          if (planes.size() != tasks) throw std::invalid_argument("one plane a task");
          auto* const written = pointers<uint8_t* const*>(planes);
          run("unify", [&] {
            return condu_cuda_unify(&place.view, &work.view, tasks, has_base, zero_sum,
                                    at<void*>(u), (uint8_t)u_dtype, written, at<double*>(sums));
          });
        });

  m.def("cuda_absorb", [](const Place& place, const Work& work, const State& old, bool has_base,
                          int zero_sum, uint64_t u, const Addresses& planes, uint64_t sums) {
    if (planes.size() != old.view.tasks + 1) throw std::invalid_argument("one plane a task");
    auto* const written = pointers<uint8_t* const*>(planes);
    run("absorb", [&] {
      return condu_cuda_absorb(&place.view, &work.view, &old.view, has_base, zero_sum, at<void*>(u),
                               written, at<double*>(sums));
    });
  });

  m.def("cuda_merge", [](const Place& place, const Work& work, const State& a, const State& b,
                         int zero_sum, uint64_t u, const Addresses& planes, uint64_t sums) {
    if (planes.size() != a.view.tasks + b.view.tasks) {
      throw std::invalid_argument("one plane a task");
    }
    auto* const written = pointers<uint8_t* const*>(planes);
    run("merge", [&] {
      return condu_cuda_merge(&place.view, &work.view, &a.view, &b.view, zero_sum, at<void*>(u),
                              written, at<double*>(sums));
    });
  });

  m.def("cuda_decouple",
        [](const Place& place, const Work& work, const State& expert, bool has_base) {
          run("decouple",
              [&] { return condu_cuda_decouple(&place.view, &work.view, &expert.view, has_base); });
        });

  m.def("cuda_measure", [](const Place& place, const Work& work, bool has_base, uint64_t sums) {
    run("measure",
        [&] { return condu_cuda_measure(&place.view, &work.view, has_base, at<double*>(sums)); });
  });

  m.def("cuda_threshold_workspace", &condu_cuda_threshold_workspace);
  m.def("cuda_magnitude_threshold",
        [](const Place& place, const Work& work, bool joint, uint64_t ranks, uint64_t threshold) {
          run("magnitude_threshold", [&] {
            return condu_cuda_magnitude_threshold(&place.view, &work.view, joint,
                                                  at<const int64_t*>(ranks), at<float*>(threshold));
          });
        });

  m.def("cuda_align", [](const Place& place, const Work& work, uint64_t threshold,
                         bool to_reference, uint64_t conflicts) {
    run("align", [&] {
      return condu_cuda_align(&place.view, &work.view, at<const float*>(threshold), to_reference,
                              at<uint64_t*>(conflicts));
    });
  });

  m.def("cuda_average", [](const Place& place, const Work& work, double weight) {
    run("average", [&] { return condu_cuda_average(&place.view, &work.view, weight); });
  });
}
