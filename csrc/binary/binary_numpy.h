// The numpy doors of bit codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "binary/binary.h"
#include "binary/scores.h"
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

inline Codes codes_of(const Array<uint8_t>& array) {
  check_array(array.shape(1) < int64_t(1) << 20, "codes must be shorter than 2^20 bytes");
  return {array.data(), array.shape(1), array.shape(0), array.shape(1)};
}

inline constexpr auto kSerial = [](int64_t count, int64_t, const auto& body) { body(0, count); };

inline std::pair<py::array, py::array> hamming_topk_door(const py::array& queries,
                                                         const py::array& codes, int64_t k) {
  const auto query_array = as_array<uint8_t>(queries, 2, "queries");
  const auto code_array = as_array<uint8_t>(codes, 2, "codes");
  check_array(query_array.shape(1) == code_array.shape(1),
              "queries and codes must have the same width in bytes");
  check_array(k >= 1, "k must be at least 1, got " + std::to_string(k));
  const Codes query_codes = codes_of(query_array), documents = codes_of(code_array);
  Array<int32_t> distances({query_codes.count, k});
  Array<int64_t> ids({query_codes.count, k});
  int32_t* distance = distances.mutable_data();
  int64_t* id = ids.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    write_topk<HammingScan>(search(HammingScan(query_codes, k), documents, {}, kSerial), k,
                            std::numeric_limits<int32_t>::max(), distance, id);
  }
  return {distances, ids};
}

inline py::array hamming_distance_door(const py::array& a, const py::array& b) {
  const auto left = as_array<uint8_t>(a, 2, "a"), right = as_array<uint8_t>(b, 2, "b");
  check_array(left.shape(1) == right.shape(1), "a and b must have the same width in bytes");
  const Codes rows = codes_of(left), columns = codes_of(right);
  Array<int32_t> distances({rows.count, columns.count});
  int32_t* to = distances.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    hamming_distances(rows, columns, 0, columns.count, to);
  }
  return std::move(distances);
}

inline std::tuple<py::array, py::array, py::array> range_search_csr_door(const py::array& queries,
                                                                         const py::array& codes,
                                                                         int64_t radius) {
  const auto query_array = as_array<uint8_t>(queries, 2, "queries");
  const auto code_array = as_array<uint8_t>(codes, 2, "codes");
  check_array(query_array.shape(1) == code_array.shape(1),
              "queries and codes must have the same width in bytes");
  check_array(radius >= 0, "radius must not be negative, got " + std::to_string(radius));
  const Codes query_codes = codes_of(query_array), documents = codes_of(code_array);
  Array<int64_t> offsets(query_codes.count + 1);
  int64_t* offset = offsets.mutable_data();
  std::vector<Collector> found;
  {
    const py::gil_scoped_release unlocked;
    found = search(HammingScan(query_codes, kKeepAll, radius), documents, {}, kSerial);
    offset[0] = 0;
    for (size_t q = 0; q < found.size(); ++q) {
      offset[q + 1] = offset[q] + int64_t(found[q].keys.size());
    }
  }
  Array<int32_t> distances(offset[query_codes.count]);
  Array<int64_t> ids(offset[query_codes.count]);
  int32_t* distance = distances.mutable_data();
  int64_t* id = ids.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    for (const Collector& one : found) {
      for (const uint64_t key : one.keys) {
        *distance++ = HammingScan::distance(key);
        *id++ = HammingScan::row(key);
      }
    }
  }
  return {offsets, distances, ids};
}

inline std::pair<py::array, py::array> asymmetric_topk_door(const py::array& queries,
                                                            const py::array& codes, int64_t k,
                                                            const std::optional<py::array>& scale) {
  const auto query_array = as_array<float>(queries, 2, "queries");
  const Codes documents = codes_of(as_array<uint8_t>(codes, 2, "codes"));
  const int64_t count = query_array.shape(0), dim = query_array.shape(1), width = (dim + 7) / 8;
  check_array(dim > 0 && documents.bytes > 0 && documents.bytes % width == 0,
              "codes must hold one or more planes of ceil(dim / 8) bytes");
  check_array(documents.count < int64_t(1) << ScoreKey::kRowBits, "codes have too many rows");
  check_array(k >= 1, "k must be at least 1, got " + std::to_string(k));
  const float* query = query_array.data();
  check_array(std::all_of(query, query + count * dim, [](float x) { return std::isfinite(x); }),
              "queries must be finite");
  const float* scales = nullptr;
  if (scale) {
    const auto scale_array = as_array<float>(*scale, 1, "scale");
    check_array(scale_array.shape(0) == documents.count, "scale must have one value per code");
    scales = scale_array.data();
    check_array(std::all_of(scales, scales + documents.count,
                            [](float x) { return x > 0 && std::isfinite(x); }),
                "scale must be positive and finite");
  }
  Array<float> scores({count, k});
  Array<int64_t> ids({count, k});
  float* score = scores.mutable_data();
  int64_t* id = ids.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    constexpr int64_t kQueriesAtOnce = 256;  // bounds the memory of their tables
    for (int64_t first = 0; first < count; first += kQueriesAtOnce) {
      const int64_t some = std::min(kQueriesAtOnce, count - first);
      const ScoreScan scan(query + first * dim, dim, some, dim, documents.bytes, k, scales,
                           documents.count);
      write_topk<ScoreKey>(search(scan, documents, {}, kSerial), k,
                           -std::numeric_limits<float>::infinity(), score + first * k,
                           id + first * k);
    }
  }
  return {scores, ids};
}

inline void bind_binary(py::module_& module) {
  module.def("pack_sign", &pack_sign_door, py::arg("x"), py::arg("threshold"));
  module.def("hamming_topk", &hamming_topk_door, py::arg("queries"), py::arg("codes"),
             py::arg("k"));
  module.def("hamming_distance", &hamming_distance_door, py::arg("a"), py::arg("b"));
  module.def("range_search_csr", &range_search_csr_door, py::arg("queries"), py::arg("codes"),
             py::arg("radius"));
  module.def("asymmetric_topk", &asymmetric_topk_door, py::arg("queries"), py::arg("codes"),
             py::arg("k"), py::arg("scale"));
}

}  // namespace emblas
