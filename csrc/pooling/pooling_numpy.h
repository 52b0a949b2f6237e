// The numpy door of segment pooling: float32 and float64.
#pragma once

#include <memory>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/numpy.h"
#include "common/packed.h"
#include "pooling/pooling.h"

namespace emblas {

template <class T>
py::array segment_pool_array(const Array<T>& x, const Array<int32_t>& cu_seqlens,
                             const std::optional<py::array>& weights, bool normalize) {
  const int64_t batch = cu_seqlens.shape(0) - 1, tokens = x.shape(0), dim = x.shape(1);
  check_array(batch >= 0, "cu_seqlens must have at least one element");
  std::optional<Array<T>> token_weights;
  if (weights) {
    token_weights = as_array<T>(*weights, 1, "weights");
    check_array(token_weights->shape(0) == tokens, "weights must hold one weight per token");
  }
  Array<T> out({batch, dim});
  {
    SegmentPoolArgs<T> args{};
    args.segments.x = x.data();
    args.segments.dim = args.segments.row_stride = dim;
    args.segments.begins = cu_seqlens.data();
    args.segments.ends = cu_seqlens.data() + 1;
    args.segments.weights = token_weights ? token_weights->data() : nullptr;
    args.modes = {{PoolMode::mean}, 1};
    args.normalize = normalize;
    args.out = out.mutable_data();
    const py::gil_scoped_release unlocked;
    check_array(valid_cu_seqlens(args.segments.begins, batch, tokens),
                "cu_seqlens must start at 0, never decrease and end at the number of tokens");
    const AlignedArray<T> scratch = aligned_array<T>(2 * dim);
    kernels<PoolingKernels>().of(T{}).forward(args, 0, batch, scratch.get());
  }
  return std::move(out);
}

inline py::array segment_pool_door(const py::array& x, const py::array& cu_seqlens,
                                   const std::optional<py::array>& weights, bool normalize) {
  const auto offsets = as_array<int32_t>(cu_seqlens, 1, "cu_seqlens");
  if (py::isinstance<Array<double>>(x)) {
    return segment_pool_array(as_array<double>(x, 2, "x"), offsets, weights, normalize);
  }
  return segment_pool_array(as_array<float>(x, 2, "x"), offsets, weights, normalize);
}

inline void bind_pooling(py::module_& module) {
  module.def("segment_pool", &segment_pool_door, py::arg("x"), py::arg("cu_seqlens"),
             py::arg("weights"), py::arg("normalize"));
}

}  // namespace emblas
