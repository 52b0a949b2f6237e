// Generalized mean of segments on a GPU; the formulas stand in pooling.h. x^p = 2^(p log2 x): some
// 30 instructions per element, so on a GPU memory still is the limit for 32-bit values, arithmetic
// for 16-bit ones.
//
// Forward: `sum_chunks` (segment_sums_cuda.cuh) adds up powers, `finish_roots` takes the root of
// their mean. Backward: `gem_contributions` makes the gradient by a mean once per segment and reads
// x for the gradient of p; segment_gradients_cuda.cuh hands it on to the rows, and to the weights,
// and reads x again.
#pragma once

#include "pooling/contributions_cuda.cuh"

namespace emblas::cuda {

// Grid (batch).
template <class T>
__global__ void __launch_bounds__(kThreads) finish_roots(SegmentSums<T> sums, Accumulator<T>* out) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x, dim = sums.rows.segments.dim;
  const Positions range = pooled_range(sums.rows, b, PoolMode::mean);
  const A total = total_weight<kWarps>(sums.rows, range, PoolMode::mean);
  const A inverse = 1 / *sums.power;
  for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
    const A sum = sum_of_chunks(sums, sums.partial, b, range, c);
    out[b * dim + c] = total == 0 ? A(0) : exp2(log2(sum / total) * inverse);
  }
}

template <class T>
struct GemBackwardArgs {
  using A = Accumulator<T>;
  Contributions<T> parts;
  const A* power;  // [1]
  A epsilon;
  const A* grad_out;  // [batch, dim]
  const A* out;       // [batch, dim]
  A* grad_power;      // [batch]
};

// Grid (batch). Warps take turns at the rows, tile of columns by tile. `aligned`: rows start at
// multiples of 16 bytes, so a lane's columns are one vector.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 3) gem_contributions(GemBackwardArgs<T> args) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>;
  const A ln2 = A(0.69314718055994530942);
  const Contributions<T>& parts = args.parts;
  const SegmentRows<T>& rows = parts.rows;
  const int64_t b = blockIdx.x, dim = rows.segments.dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Positions range = pooled_range(rows, b, PoolMode::mean);
  keep_range(parts, b, range);
  const A total = total_weight<kWarps>(rows, range, PoolMode::mean);
  const A power = *args.power;
  A slope = 0, along = 0;  // d loss / dp; what the gradients of weights lose
  uint64_t hash = 0;
  for (int64_t tile = 0; tile < dim; tile += kTileColumns<T>) {
    const int64_t columns = min(dim - tile, int64_t(kTileColumns<T>));
    // The lane's i-th column in the tile is first + i * step.
    const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
    const bool whole = aligned && first + vector <= columns;
    A shared[vector] = {};
    for (int i = 0; i < vector; ++i) {
      const int c = first + i * step;
      if (c >= columns) continue;
      const int64_t at = b * dim + tile + c;
      if (total != 0) {
        const A root = args.out[at], log = log2(root);
        shared[i] = args.grad_out[at] * exp2((1 - power) * log) / (power * total);
        if (warp == 0) {
          slope -= args.grad_out[at] * root * log * ln2 / power;
          along += args.grad_out[at] * root / (power * total);
        }
      }
      if (warp == 0) {
        parts.shared[at] = shared[i];
        hash += hash_of(shared[i], tile + c);
      }
    }
    for (int64_t p = range.begin + warp; p < range.end; p += kWarps) {
      const A weight = weight_at(rows, range.origin, p, PoolMode::mean);
      if (weight == 0) continue;
      const T* row = row_start(rows.segments, row_of(rows, p)) + tile;
      const auto add = [&](T x, A gradient) {
        const A wide = simt::to_accumulator(x);
        const A log = log2(wide < args.epsilon ? args.epsilon : wide);
        slope += weight * gradient * exp2(power * log) * (log * ln2);
      };
      if (whole) {
        const simt::Vector<T> x = simt::load_vector(row + first);
        for (int i = 0; i < vector; ++i) add(x.at[i], shared[i]);
      } else {
        for (int i = 0; i < vector; ++i) {
          const int c = first + i * step;
          if (c < columns) add(row[c], shared[i]);
        }
      }
    }
  }
  keep_fingerprint(parts, b, hash);
  slope = simt::block_sum<kWarps>(slope);
  along = simt::block_sum<kWarps>(along);
  if (threadIdx.x == 0) {
    args.grad_power[b] = total == 0 ? A(0) : slope;
    parts.along[b] = along;
  }
}

}  // namespace emblas::cuda
