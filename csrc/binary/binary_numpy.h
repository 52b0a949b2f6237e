// The numpy doors of bit codes.
#pragma once

#include <optional>
#include <utility>

#include "binary/binary.h"
#include "binary/search.h"
#include "common/isa.h"
#include "common/numpy.h"

namespace emblas {

template <class T>
py::array pack_sign_array(const Array<T>& x, const std::optional<py::array>& threshold) {
  const int64_t rows = x.shape(0), dim = x.shape(1);
  std::optional<Array<T>> limits;
  if (threshold) {
    limits = as_array<T>(*threshold, 1, "threshold");
    check_array(limits->shape(0) == dim, "threshold must have one value per dimension");
  }
  Array<uint8_t> codes({rows, (dim + 7) / 8});
  const T* from = x.data();
  const T* limit = limits ? limits->data() : nullptr;
  uint8_t* to = codes.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    kernels<PackSignKernels>().of(T{}).pack(from, dim, limit, dim, 0, rows, to);
  }
  return std::move(codes);
}

inline py::array pack_sign_door(const py::array& x, const std::optional<py::array>& threshold) {
  if (py::isinstance<Array<double>>(x)) {
    return pack_sign_array(as_array<double>(x, 2, "x"), threshold);
  }
  return pack_sign_array(as_array<float>(x, 2, "x"), threshold);
}

inline std::pair<py::array, py::array> hamming_topk_door(const py::array& queries,
                                                         const py::array& codes, int64_t k) {
  const auto query_codes = as_array<uint8_t>(queries, 2, "queries");
  const auto document_codes = as_array<uint8_t>(codes, 2, "codes");
  check_array(query_codes.shape(1) == document_codes.shape(1),
              "queries and codes must have the same width in bytes");
  check_array(document_codes.shape(1) < int64_t(1) << 20, "codes must be shorter than 2^20 bytes");
  check_array(k >= 0, "k must not be negative, got " + std::to_string(k));
  Array<int32_t> distances({int64_t(query_codes.shape(0)), k});
  Array<int64_t> ids({int64_t(query_codes.shape(0)), k});
  const int64_t bytes = document_codes.shape(1);
  const HammingTopk args{query_codes.data(),
                         bytes,
                         query_codes.shape(0),
                         document_codes.data(),
                         bytes,
                         document_codes.shape(0),
                         bytes,
                         k,
                         distances.mutable_data(),
                         ids.mutable_data()};
  {
    const py::gil_scoped_release unlocked;
    hamming_topk(args, [](int64_t count, int64_t, const auto& body) { body(0, count); });
  }
  return {distances, ids};
}

inline void bind_binary(py::module_& module) {
  module.def("pack_sign", &pack_sign_door, py::arg("x"), py::arg("threshold"));
  module.def("hamming_topk", &hamming_topk_door, py::arg("queries"), py::arg("codes"),
             py::arg("k"));
}

}  // namespace emblas
