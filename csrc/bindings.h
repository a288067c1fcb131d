// What the bindings of the CPU and of the CUDA kernels share.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdint.h>

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Addresses = Array<uint64_t>;

template <class Pointer>
Pointer pointers(const Addresses& addresses) {
  static_assert(sizeof(void*) == sizeof(uint64_t), "64-bit only");
  return reinterpret_cast<Pointer>(const_cast<uint64_t*>(addresses.data()));
}

// Adds the functions cuda_* to the module.
void bind_cuda(py::module_& m);
