// The door between numpy and the kernels. Only module.cpp compiles it: a family's <family>_numpy.h
// holds its doors and is included there, so pybind11 is paid for once.
//
// A door checks its arrays, releases the GIL and runs the same kernels as the torch operator, on
// the calling thread.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "types.h"

namespace emblas {
namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

inline void check_array(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Arrays are never converted: a silent copy of a large array is worse than an error.
template <class T>
Array<T> as_array(const py::array& array, int ndim, const char* name) {
  if (!py::isinstance<Array<T>>(array)) {
    throw py::type_error(std::string(name) + " must be a C-contiguous array of " +
                         std::string(py::str(py::dtype::of<T>())) + ", got " +
                         std::string(py::str(array.dtype())));
  }
  check_array(array.ndim() == ndim, std::string(name) + " must have " + std::to_string(ndim) +
                                        " dimensions, got " + std::to_string(array.ndim()));
  return py::cast<Array<T>>(array);
}

}  // namespace emblas
