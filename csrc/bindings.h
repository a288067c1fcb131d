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

// A status of the CPU's kernels as an exception.
void raise_for(int status, const char* operation);

// Add their functions to the module; those of CUDA start with cuda_.
void bind_alignment(py::module_& m);
void bind_cuda(py::module_& m);
