// The door of the pooling operators over segments on CUDA tensors: guards of what protects memory.
// Offsets, lengths and indices stay on the device: kernels clamp them, nobody waits.
#pragma once

#include "common/cuda/device_call.h"
#include "pooling/pooling_cuda.h"
#include "pooling/segments_door.h"

namespace emblas {

// Checks the tensors, but for their values, and lets kernels read them. T is the dtype of x.
template <class T>
cuda::SegmentRows<T> segment_rows(const DeviceCall& call, const SegmentTensors& tensors) {
  using A = Accumulator<T>;
  const Tensor& x = tensors.x;
  const int64_t batch = tensors.batch(), positions = tensors.positions();
  const char* ranges =
      "starts, ends, skip_prefix and index must be contiguous int32 vectors on the device of x";
  check(rows_of(x) <= INT32_MAX, "x must have less than 2^31 tokens");
  check(batch >= 0, "cu_seqlens must have at least one element");
  call.check_vector<int32_t>(tensors.starts, tensors.ends ? batch : batch + 1, ranges);
  if (tensors.ends) call.check_vector<int32_t>(*tensors.ends, batch, ranges);
  if (tensors.skip) call.check_vector<int32_t>(*tensors.skip, batch, ranges);
  if (tensors.index) call.check_vector<int32_t>(*tensors.index, positions, ranges);
  check(!tensors.index || positions == 0 || rows_of(x) > 0, "index must hold rows of x");
  if (tensors.weights) {
    call.check_vector<A>(*tensors.weights, positions,
                         "weights must be a contiguous vector of one weight per token on the "
                         "device of x, float64 where x is float64 and float32 otherwise");
  }
  Segments<T> out{};
  out.x = call.read<T>(x);
  out.dim = dim_of(x);
  out.row_stride = x.stride(x.dim() - 2);
  if (x.dim() == 3 && x.stride(0) != x.size(1) * x.stride(1)) {
    out.plane_rows = x.size(1);
    out.plane_stride = x.stride(0);
  }
  out.begins = call.read<int32_t>(tensors.starts);
  out.ends = tensors.ends ? call.read<int32_t>(*tensors.ends) : out.begins + 1;
  out.skip = call.read<int32_t>(tensors.skip);
  out.index = call.read<int32_t>(tensors.index);
  out.weights = call.read<A>(tensors.weights);
  return {out, batch, positions, rows_of(x)};
}

// Checks x, which the dtype of everything else depends on.
inline void check_tokens(const DeviceCall& call, const Tensor& x) {
  check(call.holds(x) && (x.dim() == 2 || x.dim() == 3) &&
            (dim_of(x) <= 1 || x.stride(x.dim() - 1) == 1 || x.numel() == 0),
        "x must be a tensor (tokens, dim) or (batch, length, dim) with a contiguous last "
        "dimension");
}

}  // namespace emblas
