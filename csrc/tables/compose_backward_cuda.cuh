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
