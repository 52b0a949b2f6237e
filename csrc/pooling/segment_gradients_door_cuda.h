// The door of the gradients of pooling over segments on CUDA tensors: their workspaces, and the
// order in which rows find the segments that reach them.
#pragma once

#include "common/cuda/sort.h"
#include "pooling/segments_door_cuda.h"

namespace emblas {

template <class T>
class SegmentGradients {
  using A = Accumulator<T>;

 public:
  SegmentGradients(const DeviceCall& call, const SegmentTensors& tensors, const PoolModes& modes)
      : parts{}, call_(call), x_(tensors.x) {
    parts.rows = segment_rows<T>(call, tensors);
    parts.modes = modes;
    const int64_t batch = parts.rows.batch, positions = parts.rows.positions;
    const int64_t numbers = modes.count * batch;
    ranges_ = call.empty<1>(ScalarType::Int, {4 * batch + 2 * numbers});
    parts.begin = call.write<int32_t>(ranges_);
    parts.end = parts.begin + batch;
    const bool several = modes.count > 1;
    parts.first = several ? parts.begin + 4 * batch : parts.begin;
    parts.last = several ? parts.first + numbers : parts.end;
    shared_ = call.empty<2>(kScalarType<A>, {numbers, dim_of(x_) + 1});
    parts.shared = call.write<A>(shared_);
    parts.along = parts.shared + numbers * dim_of(x_);
    if (tensors.index) {
      owner_ = call.empty<1>(ScalarType::Int, {positions});
      torch::stable::zero_(owner_);
      call.read<int32_t>(owner_);  // no workspace: zeros may be read
      parts.owner = write<int32_t>(owner_);
    }
    if (tensors.ends) {
      numbers_ = call.empty<2>(ScalarType::Long, {2, batch});
      parts.fingerprint = call.write<int64_t>(numbers_);
    }
  }

  Tensor empty_like_x(bool needed) const {
    if (!needed) return call_.empty<1>(x_.scalar_type(), {0});
    if (x_.dim() == 2) return call_.empty<2>(x_.scalar_type(), {x_.size(0), x_.size(1)});
    return call_.empty<3>(x_.scalar_type(), {x_.size(0), x_.size(1), x_.size(2)});
  }

  // The order of the segments, once the contributions are there.
  cuda::Order order() const {
    const int64_t batch = parts.rows.batch;
    if (!parts.fingerprint) return {nullptr, parts.begin, parts.end, batch};
    int64_t* order = parts.fingerprint + batch;
    int32_t *starts = parts.end + batch, *reach = starts + batch;
    cuda::order_spans<T>(parts, order, starts, reach, call_.stream());
    return {order, starts, reach, batch};
  }

  // Writes the gradients of the rows.
  void rows(cuda::Order order, const A* power, A epsilon, const Tensor& grad_x) const {
    std::array<Tensor, 2> sorted;
    if (parts.owner) {
      const int64_t positions = parts.rows.positions;
      const Tensor keys = call_.empty<1>(ScalarType::Int, {positions});
      cuda::row_keys<T>(parts, call_.write<int32_t>(keys), call_.stream());
      sorted = sort_stable(keys);
      const int32_t* key = call_.read<int32_t>(sorted[0]);
      order = {call_.read<int64_t>(sorted[1]), key, key, positions};
    }
    cuda::row_gradients<T>(parts, order, power, epsilon, call_.write<T>(grad_x), call_.stream());
  }

  cuda::Contributions<T> parts;

 private:
  const DeviceCall& call_;
  const Tensor& x_;
  Tensor ranges_, shared_, owner_, numbers_;
};

}  // namespace emblas
