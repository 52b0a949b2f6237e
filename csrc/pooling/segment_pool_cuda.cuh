// Segment pooling in the linear modes on a GPU; the formulas stand in pooling.h.
//
// Forward, two kernels: `sum_chunks` (segment_sums_cuda.cuh) reads x, `finish_pooled` adds up what
// it found, divides and normalizes.
//
// Backward: `pool_contributions` makes dm_b / d_b once per segment, segment_gradients_cuda.cuh
// hands it on to the rows, and to the weights, for which x is read.
#pragma once

#include "pooling/contributions_cuda.cuh"

namespace emblas::cuda {

template <class T>
__device__ inline void store_pooled(bool wide, Accumulator<T> value, void* out, int64_t at) {
  if (wide) {
    static_cast<Accumulator<T>*>(out)[at] = value;
  } else {
    simt::from_accumulator(value, static_cast<T*>(out) + at);
  }
}
template <class T>
__device__ inline Accumulator<T> load_pooled(bool wide, const void* pooled, int64_t at) {
  if (wide) return static_cast<const Accumulator<T>*>(pooled)[at];
  return simt::to_accumulator(static_cast<const T*>(pooled)[at]);
}

// Grid (batch). A thread owns the columns threadIdx.x + i * kThreads; with `normalize` it keeps
// their sums in the segment's first partial row while the norm is being found.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_pooled(SegmentPoolArgs<T> args) {
  using A = Accumulator<T>;
  const SegmentSums<T>& sums = args.sums;
  const int64_t b = blockIdx.x, dim = sums.rows.segments.dim;
  const Positions range = pooled_range(sums.rows, b, sums.mode);
  const A total = total_weight<kWarps>(sums.rows, range, sums.mode);
  A factor = inverse_divisor(total, sums.mode);
  const bool empty = factor == 0;
  if (args.normalize) {
    // An empty segment has a row of partial sums too.
    A* kept = sums.partial + (sums.chunked ? first_slot(sums.rows, b) : b) * dim;
    A square = 0;
    for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
      const A sum = sum_of_chunks(sums, sums.partial, b, range, c);
      kept[c] = sum;
      square += sum * sum;
    }
    square = simt::block_sum<kWarps>(square);
    const A norm = empty ? A(0) : sqrt(square) * fabs(factor);
    if (threadIdx.x == 0) args.norm[b] = norm;
    factor /= max(norm, A(kNormalizeEpsilon));
    for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
      store_pooled<T>(args.wide, empty ? A(0) : factor * kept[c], args.out, b * dim + c);
    }
  } else {
    for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
      const A sum = sum_of_chunks(sums, sums.partial, b, range, c);
      store_pooled<T>(args.wide, empty ? A(0) : factor * sum, args.out, b * dim + c);
    }
  }
}

// Grid (batch). Each mode in its turn.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_contributions(SegmentPoolBackwardArgs<T> args) {
  using A = Accumulator<T>;
  const Contributions<T>& parts = args.parts;
  const SegmentRows<T>& rows = parts.rows;
  const PoolModes& modes = parts.modes;
  const int64_t b = blockIdx.x, dim = rows.segments.dim;
  keep_range(parts, b,
             modes.count == 1 ? pooled_range(rows, b, modes.at[0]) : positions_of(rows, b));
  uint64_t hash = 0;
  for (int64_t m = 0; m < modes.count; ++m) {
    const PoolMode mode = modes.at[m];
    const int64_t number = number_of(parts, b, m), from = number * dim;
    const Positions range = pooled_range(rows, b, mode);
    if (threadIdx.x == 0) {
      parts.first[number] = int32_t(range.begin);
      parts.last[number] = int32_t(range.end);
    }
    const A total = total_weight<kWarps>(rows, range, mode);
    const A factor = inverse_divisor(total, mode);
    A length = 1, removed = 0;
    bool project = false;
    if (args.normalize) {
      project = args.norm[b] > A(kNormalizeEpsilon);
      length = project ? args.norm[b] : A(kNormalizeEpsilon);
      A along = 0;
      for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
        along += load_pooled<T>(args.wide, args.out, from + c) *
                 load_pooled<T>(args.wide, args.grad_out, from + c);
      }
      along = simt::block_sum<kWarps>(along);
      removed = project ? along : A(0);
    }
    A along = 0;
    for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
      const A value = load_pooled<T>(args.wide, args.out, from + c);
      const A gradient = load_pooled<T>(args.wide, args.grad_out, from + c) - removed * value;
      along += value * gradient;  // length m_b . dm_b
      const A shared = factor == 0 ? A(0) : gradient * (factor / length);
      parts.shared[from + c] = shared;
      hash += hash_of(shared, m * dim + c);
    }
    along = simt::block_sum<kWarps>(along);
    // With a projection dm_b is orthogonal to m_b; the divisor of `sum` has no derivative.
    const bool none = project || total == 0 || mode == PoolMode::sum;
    if (mode == PoolMode::mean_sqrt_len) along /= 2;
    if (threadIdx.x == 0) parts.along[number] = none ? A(0) : along / total;
  }
  keep_fingerprint(parts, b, hash);
}

}  // namespace emblas::cuda
