// What the sums of gradients of composed lookups are made of; the formulas stand in compose.h.
#pragma once

#include "tables/compose_cuda.cuh"

namespace emblas::cuda::tables {

// Where an id stands: its feature and bag.
struct Place {
  int feature;
  int64_t bag;
};
__device__ inline int64_t segment_at(const int32_t* segment_of, int64_t features, int64_t bags,
                                     int64_t i) {
  return segment_of ? segment_of[i] : i % features * bags + i / features;
}
__device__ inline Place place_of(int64_t segment, int64_t bags) {
  return {int(segment / bags), segment % bags};
}

// The gradient of each lookup's slot, times what stands before its row. `whole`: that is a number,
// neither a product of other rows nor the choice of a maximum.
template <class T, bool whole>
struct LookupGradients {
  using Element = T;
  using A = Accumulator<T>;
  static constexpr int kTile = 32, kUnroll = whole ? 4 : 1;
  ComposeGradientArgs<T> args;
  Composed composed;
  const int64_t* order;

  struct Prepared {
    int64_t at;  // of the slot in grad_out
    A factor;
    int64_t i;
    int part;
  };
  __device__ Prepared prepare(int64_t first, int64_t end) const {
    const int64_t place = first + lane_of_warp();
    Prepared prepared{0, A(0), 0, 0};
    if (place >= end) return prepared;
    const auto& forward = args.forward;
    const auto lookup = uint32_t(order[place]);
    const int own = int(lookup % uint32_t(composed.most_parts));
    const int64_t i = lookup / uint32_t(composed.most_parts);
    const int64_t segment = segment_at(args.segment_of, composed.num_features, forward.ids.bags, i);
    const Place at = place_of(segment, forward.ids.bags);
    prepared.i = i;
    prepared.part = composed.first_part[at.feature] + own;
    const ComposePart& part = composed.parts[prepared.part];
    prepared.at = at.bag * composed.dim + part.column;
    A factor = sign_of<A>(args.numbers[lookup]);
    if (forward.combine == Combine::mean) factor /= A(part.slot_size);
    if (args.scale) factor *= args.scale[segment];
    if (forward.weights_per_id == 1) factor *= forward.weights[i];
    if (forward.weights_per_id > 1) factor *= forward.weights[i * forward.weights_per_id + own];
    prepared.factor = factor;
    return prepared;
  }

  template <class C>
  __device__ void add(const Prepared& prepared, int n, bool inside, const C& columns,
                      A (&sum)[C::size]) const {
    const int64_t at = __shfl_sync(simt::kAllLanes, prepared.at, n);
    const A factor = __shfl_sync(simt::kAllLanes, prepared.factor, n);
    A x[C::size] = {};
    if (inside) columns.load(args.grad_out + at, x);
    for (int k = 0; k < C::size; ++k) x[k] *= factor;
    if constexpr (!whole) {
      const int64_t i = __shfl_sync(simt::kAllLanes, prepared.i, n);
      const int own = __shfl_sync(simt::kAllLanes, prepared.part, n);
      if (inside) finish(at, i, own, columns, x);
    }
    for (int k = 0; k < C::size; ++k) sum[k] += x[k];
  }

  template <class C>
  __device__ void finish(int64_t at, int64_t i, int own, const C& columns, A (&x)[C::size]) const {
    const ComposePart& part = composed.parts[own];
    const uint32_t* numbers =
        args.numbers + i * composed.most_parts - composed.first_part[part.feature];
    const int last = part.slot_first + part.slot_size;
    for (int p = part.slot_first; args.forward.combine == Combine::product && p < last; ++p) {
      if (p == own) continue;
      A other[C::size] = {};
      columns.load(row_of(args.forward.table, composed.parts[p], numbers[p]), other);
      for (int k = 0; k < C::size; ++k) x[k] *= sign_of<A>(numbers[p]) * other[k];
    }
    for (int k = 0; args.argmax && k < C::size; ++k) {
      const int64_t column = columns.first + k * columns.step;
      if (column < columns.dim && args.argmax[at + column] != i) x[k] = 0;
    }
  }
};

}  // namespace emblas::cuda::tables
