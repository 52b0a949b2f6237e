// Gradients of the rows and of the weights on a GPU, from what segments contribute.
//
// The first kernel of each operator has made `shared`, what a segment contributes to each of its
// tokens but for the token's weight. Here a warp owns a row of the gradient, finds the segments
// that reach it by binary search, adds up their contributions in a fixed order and writes it once:
// no atomics, and rows that no segment reaches get zeros.
//
// Segments that come as offsets are in order. Spans are sorted by range and, where ranges are
// equal, by a fingerprint of what they contribute: sums have the same bits in whatever order spans
// are given. `order_spans` counts how many spans come before each one (batch^2 comparisons of
// numbers that the second-level cache keeps; nothing beside the gradients for some ten thousand
// spans). `reach` is how far the spans up to each one go: those that reach a row lie between the
// first whose `reach` is beyond it and the last that begins at or before it. With an index, the
// positions that list a row are neighbours once the caller has sorted `row_keys`.
//
// Bytes: the gradient is written once; x is read once for the weights, and for the rows of the
// generalized mean. `shared` is small and stays in the caches.
#pragma once

#include "pooling/segment_sums_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kWarpRows = 4;  // of a warp, one after the other

// Grid (blocks of kThreads spans).
template <class T>
__global__ void __launch_bounds__(kThreads)
    rank_spans(Contributions<T> parts, int64_t* order, int32_t* starts, int32_t* reach) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= parts.rows.batch) return;
  const int32_t first = parts.begin[b], last = parts.end[b];
  const int64_t fingerprint = parts.fingerprint[b];
  int64_t rank = 0;
  int32_t furthest = last;
  for (int64_t other = 0; other < parts.rows.batch; ++other) {
    const int32_t begin = parts.begin[other], end = parts.end[other];
    bool before = begin < first;
    if (begin == first) before = end < last;
    if (begin == first && end == last) {
      before = parts.fingerprint[other] < fingerprint;
      if (parts.fingerprint[other] == fingerprint) before = other < b;
    }
    if (!before) continue;
    ++rank;
    furthest = max(furthest, end);
  }
  order[rank] = b;
  starts[rank] = first;
  reach[rank] = furthest;
}

// Grid (blocks of kThreads positions).
template <class T>
__global__ void __launch_bounds__(kThreads) write_row_keys(Contributions<T> parts, int32_t* keys) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= parts.rows.positions) return;
  keys[p] = int32_t(parts.owner[p] > 0 ? row_of(parts.rows, p) : parts.rows.rows);
}

// Number of leading values, which rise, that are not above the limit.
__device__ inline int64_t count_up_to(const int32_t* values, int64_t size, int64_t limit) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] <= limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// visit(reached, place of the mode, factor) for the segments that reach a position, mode after
// mode, by a whole warp together; factors other than 0 only. `entries`: of the order, as lanes look
// at them, gives {segment, position}.
struct Reached {
  int64_t segment, position;
};
template <class T, class Entry, class Visit>
__device__ inline void for_reached(const Contributions<T>& parts, int64_t low, int64_t high,
                                   bool of_weights, const Entry& entry, const Visit& visit) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % 32;
  for (int64_t m = 0; m < parts.modes.count; ++m) {
    const PoolMode mode = parts.modes.at[m];
    if (of_weights && !weighs_tokens(mode)) continue;
    for (int64_t first = low; first < high; first += 32) {
      Reached reached = {0, 0};
      A factor = 0;
      if (first + lane < high) {
        reached = entry(first + lane);
        const int64_t p = reached.position, number = number_of(parts, reached.segment, m);
        const int64_t origin = parts.rows.segments.begins[reached.segment];
        if (p >= parts.first[number] && p < parts.last[number]) {
          factor =
              of_weights ? steps_at<T>(origin, p, mode) : weight_at(parts.rows, origin, p, mode);
        }
      }
      unsigned there = __ballot_sync(simt::kAllLanes, factor != 0);
      for (; there; there &= there - 1) {
        const int from = __ffs(there) - 1;
        visit(Reached{__shfl_sync(simt::kAllLanes, reached.segment, from),
                      __shfl_sync(simt::kAllLanes, reached.position, from)},
              m, __shfl_sync(simt::kAllLanes, factor, from));
      }
    }
  }
}

// Grid (blocks of kWarps * kWarpRows rows). `aligned`: rows of grad_x, and of x where it is read,
// start at multiples of 16 bytes. `power`: of the generalized mean, or null.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 4)
    write_row_gradients(Contributions<T> parts, Order order, const Accumulator<T>* power,
                        Accumulator<T> epsilon, T* grad_x) {
  using A = Accumulator<T>;
  constexpr int vector = aligned ? simt::kVector<T> : 1;
  const SegmentRows<T>& rows = parts.rows;
  const int64_t dim = rows.segments.dim;
  const int lane = threadIdx.x % 32;
  int64_t row = int64_t(blockIdx.x) * kWarps * kWarpRows + threadIdx.x / 32;
  for (int k = 0; k < kWarpRows && row < rows.rows; ++k, row += kWarps) {
    const bool listed = parts.owner != nullptr;
    const int64_t low = count_up_to(order.reach, order.size, listed ? row - 1 : row);
    const int64_t high = count_up_to(order.starts, order.size, row);
    const auto entry = [&](int64_t i) -> Reached {
      const int64_t number = order.order ? order.order[i] : i;
      if (!listed) return {number, row};
      return {parts.owner[number] - 1, number};
    };
    for (int64_t tile = 0; tile < dim; tile += 32 * vector) {
      const int64_t c = tile + lane * vector;
      A sum[vector] = {}, part[vector];
      bool reached = false;
      for_reached(parts, low, high, false, entry, [&](Reached at, int64_t m, A weight) {
        reached = true;
        if (c >= dim) return;
        load_values(parts.shared + number_of(parts, at.segment, m) * dim + c, part);
        if (parts.modes.at[m] == PoolMode::max) {
          const int32_t* argmax = parts.argmax + at.segment * dim + c;
          for (int i = 0; i < vector; ++i) part[i] = argmax[i] == at.position ? part[i] : A(0);
        }
        for (int i = 0; i < vector; ++i) sum[i] += weight * part[i];
      });
      if (c >= dim) continue;
      if (power && reached) {  // f'(x)
        A x[vector];
        load_values(row_start(rows.segments, row) + c, x);
        for (int i = 0; i < vector; ++i) {
          const A p = *power;
          sum[i] = x[i] < epsilon ? A(0) : sum[i] * (p * exp2((p - 1) * log2(x[i])));
        }
      }
      store_values(grad_x + row * dim + c, sum);
    }
  }
}

// Grid (blocks of kWarps * kWarpRows positions). `aligned`: rows of x start at multiples of 16
// bytes and dim is a multiple of the vector. `power`: of the generalized mean, or null.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 4)
    write_weight_gradients(Contributions<T> parts, Order order, const Accumulator<T>* power,
                           Accumulator<T> epsilon, Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  constexpr int vector = aligned ? simt::kVector<T> : 1;
  const SegmentRows<T>& rows = parts.rows;
  const int64_t dim = rows.segments.dim;
  const int lane = threadIdx.x % 32;
  int64_t p = int64_t(blockIdx.x) * kWarps * kWarpRows + threadIdx.x / 32;
  for (int k = 0; k < kWarpRows && p < rows.positions; ++k, p += kWarps) {
    const int64_t low = count_up_to(order.reach, order.size, p);
    const int64_t high = count_up_to(order.starts, order.size, p);
    const auto entry = [&](int64_t i) -> Reached { return {order.order ? order.order[i] : i, p}; };
    A slope = 0, removed = 0;
    for_reached(parts, low, high, true, entry, [&](Reached at, int64_t m, A steps) {
      removed += steps * parts.along[number_of(parts, at.segment, m)];
    });
    for (int64_t tile = 0; tile < dim; tile += 32 * vector) {
      const int64_t c = tile + lane * vector;
      A sum[vector] = {}, part[vector];
      bool reached = false;
      for_reached(parts, low, high, true, entry, [&](Reached at, int64_t m, A steps) {
        reached = true;
        if (c >= dim) return;
        load_values(parts.shared + number_of(parts, at.segment, m) * dim + c, part);
        for (int i = 0; i < vector; ++i) sum[i] += steps * part[i];
      });
      if (!reached || c >= dim) continue;
      A x[vector];
      load_values(row_start(rows.segments, row_of(rows, p)) + c, x);
      for (int i = 0; i < vector; ++i) {
        slope += (power ? raise(x[i], *power, epsilon) : x[i]) * sum[i];
      }
    }
    slope = simt::warp_sum(slope);
    if (lane == 0) grad_weights[p] = slope - removed;
  }
}

}  // namespace emblas::cuda
