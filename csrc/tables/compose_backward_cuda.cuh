// Gradients of composed lookups on a GPU; the formulas stand in compose.h.
//
// For the tables, without atomics: `write_lookups` writes the row of every lookup, the caller sorts
// them (stably: equal rows keep the order of ids and parts), find_bounds cuts the sorted list at
// the rows of the tables, and the sums of segment_sum_cuda.cuh add up each row's gradients. For the
// weights, `dot_slots` reads the rows of each id again.
//
// Bytes: 20 for each lookup (row, row among all, place in the order), a row of grad_out for each
// (for products the other rows of its slot, too), the tables' gradients once.
#pragma once

#include "tables/lookup_gradients_cuda.cuh"

namespace emblas::cuda::tables {

// Grid (ids / kThreads, most_parts).
__global__ void __launch_bounds__(kThreads)
    write_lookups(ComposedIds ids, const __grid_constant__ Composed composed,
                  const int32_t* segment_of, int64_t rows, uint32_t* numbers, int32_t* keys) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= ids.count) return;
  const int own = blockIdx.y;
  const int64_t at = i * composed.most_parts + own, id = ids.ids[i];
  const int64_t segment = segment_at(segment_of, composed.num_features, ids.bags, i);
  uint32_t number = kNoRow;
  int64_t key = rows;
  // Wrong offsets leave ids outside of all bags.
  if (uint64_t(segment) < uint64_t(composed.num_features * ids.bags) && !is_padding(ids, id)) {
    const int feature = place_of(segment, ids.bags).feature;
    if (own < composed.parts_of(feature)) {
      const ComposePart& part = composed.parts[composed.first_part[feature] + own];
      number = row_number(part, id);
      key = part.first_row + (number & ~kSignBit);
    }
  }
  numbers[at] = number;
  keys[at] = int32_t(key);
}

// Grid (segments / kWarps).
template <class A>
__global__ void __launch_bounds__(kThreads)
    count_bags(ComposedIds ids, int64_t segments, A* scale) {
  const int64_t s = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (s >= segments) return;
  const Range range = Segments{ids.offsets, segments, ids.count}.range(s);
  int used = 0;
  for (int64_t i = range.begin + lane_of_warp(); i < range.end; i += 32) {
    used += !is_padding(ids, ids.ids[i]);
  }
  used = simt::warp_sum(used);
  if (lane_of_warp() == 0) scale[s] = A(1) / A(used);
}

// Grid (ids / (kWarps * rows at once)): every 4 to 32 lanes have an id. grad_weights [ids,
// weights_per_id].
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    dot_slots(ComposeGradientArgs<T> args, const __grid_constant__ Composed composed,
              RowShape shape, Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  using C = Columns<T, aligned>;
  const auto& forward = args.forward;
  const int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / shape.lanes;
  const int64_t i = min(group, forward.ids.count - 1);
  const bool first_lane = group < forward.ids.count && lane_of_warp() % shape.lanes == 0;
  const uint32_t* numbers = args.numbers + i * composed.most_parts;
  const int64_t per_id = forward.weights_per_id;
  int first = 0, parts = 0;
  const T* gradient = args.grad_out;
  if (numbers[0] != kNoRow) {
    const int64_t segment = segment_at(args.segment_of, composed.num_features, forward.ids.bags, i);
    const Place at = place_of(segment, forward.ids.bags);
    first = composed.first_part[at.feature];
    parts = composed.parts_of(at.feature);
    gradient += at.bag * composed.dim;
  }
  const bool product = forward.combine == Combine::product;
  A dot = 0;
  for (int own = 0; own < composed.most_parts; ++own) {
    const ComposePart& part = composed.parts[first + own];
    // A product counts once for its slot, at its first part.
    if (own < parts && (!product || part.slot_first == first + own)) {
      const int last = product ? part.slot_size : 1;
      for (int64_t tile = 0; tile * shape.tile<T>() < part.width; ++tile) {
        const C columns({part.width, shape.lanes}, tile);
        A values[C::size], x[C::size] = {};
        for (int k = 0; k < C::size; ++k) values[k] = A(1);
        for (int p = 0; p < last; ++p) {
          A row[C::size] = {};
          columns.load(row_of(forward.table, (&part)[p], numbers[own + p]), row);
          for (int k = 0; k < C::size; ++k) values[k] *= sign_of<A>(numbers[own + p]) * row[k];
        }
        columns.load(gradient + part.column, x);
        A along = 0;
        for (int k = 0; k < C::size; ++k) along += values[k] * x[k];
        dot += forward.combine == Combine::mean ? along / A(part.slot_size) : along;
      }
    }
    if (per_id > 1 || own == composed.most_parts - 1) {
      for (int flip = 1; flip < shape.lanes; flip *= 2) {
        dot += __shfl_xor_sync(simt::kAllLanes, dot, flip);
      }
      if (first_lane) grad_weights[i * per_id + (per_id > 1 ? own : 0)] = dot;
      dot = 0;
    }
  }
}

}  // namespace emblas::cuda::tables
