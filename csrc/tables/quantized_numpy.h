// The numpy door of quantized tables (float32 and float64 results).
#pragma once

#include <memory>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/numpy.h"
#include "common/packed.h"
#include "tables/quantized.h"

namespace emblas {

template <class T>
py::array quantized_bag_array(const Array<int64_t>& ids, const Array<uint8_t>& packed,
                              const Array<T>& scale, const std::optional<Array<int32_t>>& offsets,
                              const std::optional<py::array>& weights, int64_t bits, int64_t dim,
                              int64_t mode, const std::optional<int64_t>& padding_id,
                              const std::optional<py::array>& zero_point) {
  const int64_t count = ids.shape(0), rows = packed.shape(0);
  check_array(bits == 2 || bits == 4 || bits == 8 || bits == 16, "bits must be 2, 4, 8 or 16");
  check_array(1 <= dim && dim < int64_t(1) << 40 && packed.shape(1) == packed_bytes(dim, bits),
              "packed must have dim * bits / 8 bytes a row");
  check_array(scale.shape(0) == rows, "scale must hold one scale per row");
  check_array(0 <= mode && mode < 3, "unknown mode of bags");
  std::optional<Array<T>> id_weights;
  if (weights) {
    id_weights = as_array<T>(*weights, 1, "per_sample_weights");
    check_array(id_weights->shape(0) == count, "per_sample_weights must hold one weight per id");
  }
  std::optional<Array<T>> zeros;
  if (zero_point) {
    zeros = as_array<T>(*zero_point, 1, "zero_point");
    check_array(zeros->shape(0) == rows, "zero_point must hold one number per row");
  }
  const int64_t bags = offsets ? offsets->shape(0) - 1 : count;
  check_array(bags >= 0, "offsets must have at least one element");
  Array<T> out({bags, dim});
  {
    const QuantizedArgs<T> args{packed.data(),
                                scale.data(),
                                rows,
                                dim,
                                bits,
                                BagMode(mode),
                                ids.data(),
                                offsets ? offsets->data() : nullptr,
                                id_weights ? id_weights->data() : nullptr,
                                padding_id ? &*padding_id : nullptr,
                                zeros ? zeros->data() : nullptr};
    T* to = out.mutable_data();
    const py::gil_scoped_release unlocked;
    if (args.offsets) {
      check_array(valid_cu_seqlens(args.offsets, bags, count),
                  "offsets must start at 0, never decrease and end at the number of ids");
    }
    if (const int64_t* id = find_id_outside(args.ids, count, rows, args.padding_id)) {
      check_array(false,
                  "ids must be 0 to " + std::to_string(rows - 1) + ", got " + std::to_string(*id));
    }
    const AlignedArray<T> scratch = aligned_array<T>(2 * padded_dim(dim));
    kernels<QuantizedKernels>().quantized.of(T{}).forward(args, 0, bags, scratch.get(), to);
  }
  return out;
}

inline py::array quantized_bag_door(const py::array& ids, const py::array& packed,
                                    const py::array& scale, const std::optional<py::array>& offsets,
                                    const std::optional<py::array>& weights, int64_t bits,
                                    int64_t dim, int64_t mode, std::optional<int64_t> padding_id,
                                    const std::optional<py::array>& zero_point) {
  const auto values = as_array<int64_t>(ids, 1, "ids");
  const auto codes = as_array<uint8_t>(packed, 2, "packed");
  std::optional<Array<int32_t>> bags;
  if (offsets) bags = as_array<int32_t>(*offsets, 1, "offsets");
  if (py::isinstance<Array<double>>(scale)) {
    return quantized_bag_array(values, codes, as_array<double>(scale, 1, "scale"), bags, weights,
                               bits, dim, mode, padding_id, zero_point);
  }
  return quantized_bag_array(values, codes, as_array<float>(scale, 1, "scale"), bags, weights, bits,
                             dim, mode, padding_id, zero_point);
}

inline void bind_quantized(py::module_& module) {
  module.def("quantized_bag", &quantized_bag_door, py::arg("ids"), py::arg("packed"),
             py::arg("scale"), py::arg("offsets"), py::arg("weights"), py::arg("bits"),
             py::arg("dim"), py::arg("mode"), py::arg("padding_id"), py::arg("zero_point"));
}

}  // namespace emblas
