// Where the rows of a segment are, on a GPU: as segments.h says, and inside the arguments whatever
// the tensors hold.
#pragma once

#include "common/cuda/simt.h"
#include "pooling/pooling_cuda.h"

namespace emblas::cuda {

struct Positions {
  int64_t begin, end;
  int64_t origin;  // where they are counted from: the skipped prefix counts
};
template <class T>
__device__ inline Positions positions_of(const SegmentRows<T>& rows, int64_t b) {
  const Segments<T>& segments = rows.segments;
  const int64_t skipped = segments.skip ? segments.skip[b] : 0;
  int64_t begin = segments.begins[b] + skipped, end = segments.ends[b];
  begin = min(max(begin, int64_t(0)), rows.positions);
  end = min(max(end, begin), rows.positions);
  return {begin, end, segments.begins[b]};
}

// What is pooled of a segment, found by all lanes of a warp together: in the modes that take one
// token, that token.
template <class T>
__device__ inline Positions pooled_range(const SegmentRows<T>& rows, int64_t b, PoolMode mode) {
  Positions range = positions_of(rows, b);
  const Accumulator<T>* weights = rows.segments.weights;
  const int lane = threadIdx.x % 32;
  if (mode == PoolMode::cls) {
    for (; weights && range.begin < range.end; range.begin += 32) {
      const int64_t p = range.begin + lane;
      const bool there = p < range.end && weights[p] != 0;
      const unsigned found = __ballot_sync(simt::kAllLanes, there);
      if (found) {
        range.begin += __ffs(found) - 1;
        break;
      }
    }
    range.begin = min(range.begin, range.end);
    range.end = min(range.begin + 1, range.end);
  } else if (mode == PoolMode::last) {
    for (; weights && range.begin < range.end; range.end -= 32) {
      const int64_t p = range.end - 1 - lane;
      const bool there = p >= range.begin && weights[p] != 0;
      const unsigned found = __ballot_sync(simt::kAllLanes, there);
      if (found) {
        range.end -= __ffs(found) - 1;
        break;
      }
    }
    range.end = max(range.begin, range.end);
    range.begin = max(range.begin, range.end - 1);
  }
  return range;
}

// Segments that come as offsets are cut into chunks of kChunkRows positions, counted from the first
// one that is pooled, for blocks to take. Which chunk has a block? Segment b starts at slot
// begin_b / kChunkRows + b. It needs ceil(length / kChunkRows) slots at most and the next segment
// starts no earlier, so slots are unique, and the host knows their number (chunk_slots) without
// reading offsets. A block finds its segment by binary search; a few slots stay idle.
template <class T>
__device__ inline int64_t first_slot(const SegmentRows<T>& rows, int64_t b) {
  const int64_t begin = rows.segments.begins[b];
  return min(max(begin, int64_t(0)), rows.positions) / kChunkRows + b;
}

struct Chunk {
  int64_t segment;
  Positions range;  // empty in an idle slot
};
template <class T>
__device__ Chunk chunk_of_slot(const SegmentRows<T>& rows, int64_t slot, PoolMode mode) {
  int64_t low = 0, high = rows.batch - 1;  // the last segment that starts at or before it
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_slot(rows, middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  Positions range = pooled_range(rows, low, mode);
  const int64_t skipped = (slot - first_slot(rows, low)) * kChunkRows;
  if (skipped < 0) return {low, {0, 0, 0}};  // before the first segment
  range.begin = min(range.begin + skipped, range.end);
  range.end = min(range.begin + kChunkRows, range.end);
  return {low, range};
}

// In the others weights only say which tokens there are.
__device__ inline bool weighs_tokens(PoolMode mode) { return mode < PoolMode::cls; }

// Derivative of the weight of a position by the caller's weight, where those weigh; positions count
// from `origin`.
template <class T>
__device__ inline Accumulator<T> steps_at(int64_t origin, int64_t p, PoolMode mode) {
  return mode == PoolMode::weighted_mean ? Accumulator<T>(p - origin + 1) : Accumulator<T>(1);
}

template <class T>
__device__ inline Accumulator<T> weight_at(const SegmentRows<T>& rows, int64_t origin, int64_t p,
                                           PoolMode mode) {
  if (!weighs_tokens(mode)) return 1;
  const Accumulator<T> steps = steps_at<T>(origin, p, mode);
  return rows.segments.weights ? rows.segments.weights[p] * steps : steps;
}

// By all threads of a block of `warps` warps, which get the same bits.
template <int warps, class T>
__device__ inline Accumulator<T> total_weight(const SegmentRows<T>& rows, const Positions& range,
                                              PoolMode mode) {
  using A = Accumulator<T>;
  const bool counted = !weighs_tokens(mode) || !rows.segments.weights;
  if (counted && mode != PoolMode::weighted_mean) return A(range.end - range.begin);
  A total = 0;
  for (int64_t p = range.begin + threadIdx.x; p < range.end; p += 32 * warps) {
    total += weight_at(rows, range.origin, p, mode);
  }
  return simt::block_sum<warps>(total);
}

// 1 / d_b; 0 where "empty means zero".
template <class A>
__device__ inline A inverse_divisor(A total, PoolMode mode) {
  if (mode == PoolMode::sum) return 1;
  if (total == 0) return 0;
  if (mode == PoolMode::max) return 1;
  return 1 / (mode == PoolMode::mean_sqrt_len ? sqrt(fabs(total)) : total);
}

template <class T>
__device__ inline int64_t row_of(const SegmentRows<T>& rows, int64_t position) {
  if (!rows.segments.index) return position;
  const int64_t row = rows.segments.index[position];
  return min(max(row, int64_t(0)), rows.rows - 1);
}

template <class T>
__device__ inline const T* row_start(const Segments<T>& segments, int64_t row) {
  if (segments.plane_rows == 0) return segments.x + row * segments.row_stride;
  return segments.x + row / segments.plane_rows * segments.plane_stride +
         row % segments.plane_rows * segments.row_stride;
}

// `count` values, 16 bytes at a time unless it is one.
template <int count, class T>
__device__ inline void load_values(const T* from, Accumulator<T> (&to)[count]) {
  if constexpr (count == 1) {
    to[0] = simt::to_accumulator(*from);
  } else {
    for (int i = 0; i < count; i += simt::kVector<T>) {
      const simt::Vector<T> values = simt::load_vector(from + i);
      for (int j = 0; j < simt::kVector<T>; ++j) to[i + j] = simt::to_accumulator(values.at[j]);
    }
  }
}
template <int count, class T>
__device__ inline void store_values(T* to, const Accumulator<T> (&from)[count]) {
  if constexpr (count == 1) {
    simt::from_accumulator(from[0], to);
  } else {
    for (int i = 0; i < count; i += simt::kVector<T>) {
      simt::Vector<T> values;
      for (int j = 0; j < simt::kVector<T>; ++j) simt::from_accumulator(from[i + j], &values.at[j]);
      simt::store_vector(to + i, values);
    }
  }
}

// Whether rows start at multiples of 16 bytes.
template <class T>
bool aligned_rows(const Segments<T>& segments) {
  const int64_t size = sizeof(T);
  return reinterpret_cast<uintptr_t>(segments.x) % 16 == 0 &&
         segments.row_stride * size % 16 == 0 && segments.plane_stride * size % 16 == 0;
}

}  // namespace emblas::cuda
