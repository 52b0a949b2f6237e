// Segment pooling in several modes at once on a GPU; the formulas stand in pooling.h.
//
// Forward, two kernels. `take_chunks` reads x once, as `sum_chunks` does for one mode
// (segment_sums_cuda.cuh), and keeps of each chunk what the modes have need of: the sums of the
// rows, their sums by position, the maxima and where these are. They are added up in the order of
// `sum_chunks`, so each mode has the bits that it has alone; maxima have no order. `finish_modes`
// puts chunks together, divides, and takes the one row that cls and last want from x itself.
//
// Backward: that of one mode, with a row of contributions for each (segment_pool_cuda.cuh).
//
// Bytes: x once, plus 2 / kChunkRows of it for each partial result; bound by memory bandwidth.
#pragma once

#include "pooling/segment_max_cuda.cuh"
#include "pooling/segment_pool_cuda.cuh"

namespace emblas::cuda {

// Grid (slots, tiles of columns). A warp takes every kWarps-th row of a chunk. `aligned`: rows
// start at multiples of 16 bytes, so a lane's columns are one vector.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2) take_chunks(SegmentPoolModesArgs<T> args) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>;
  SIMT_SHARED(A, of_warp, [kWarps][kTileColumns<T>]);
  SIMT_SHARED(int32_t, where, [kWarps][kTileColumns<T>]);
  const SegmentSums<T>& sums = args.sums;
  const SegmentRows<T>& rows = sums.rows;
  const Chunk chunk = chunk_of_block(sums);
  if (chunk.range.begin == chunk.range.end) return;  // the whole block

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = threadIdx.x;
  const int64_t tile = int64_t(blockIdx.y) * kTileColumns<T>;
  const int64_t columns = min(rows.segments.dim - tile, int64_t(kTileColumns<T>));
  // The lane's i-th column in the tile is first + i * step.
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const bool whole = aligned && first + vector <= columns;
  A plain_total = 0, stepped_total = 0;  // of the thread's own column
  Largest<A> largest[vector];
  for (Largest<A>& none : largest) none = {0, -1};
  const auto add_warps = [&](const A(&sum)[vector], A& total) {
    for (int i = 0; i < vector; ++i) of_warp[warp][first + i * step] = sum[i];
    __syncthreads();
    if (own < columns) {
      A of_chunk = 0;
      for (int w = 0; w < kWarps; ++w) of_chunk += of_warp[w][own];
      total += of_chunk;
    }
    __syncthreads();  // the next ones are written there
  };
  for (int64_t begin = chunk.range.begin; begin < chunk.range.end; begin += kChunkRows) {
    const int64_t end = min(begin + kChunkRows, chunk.range.end);
    A plain[vector] = {}, stepped[vector] = {};
#pragma unroll 2
    for (int64_t p = begin + warp; p < end; p += kWarps) {
      const A weight = weight_at(rows, chunk.range.origin, p, PoolMode::mean);
      if (weight == 0) continue;  // a masked row may hold anything, NaN included
      const A steps = weight_at(rows, chunk.range.origin, p, PoolMode::weighted_mean);
      const T* row = row_start(rows.segments, row_of(rows, p)) + tile;
      const auto take = [&](int i, T x) {
        const A value = simt::to_accumulator(x);
        plain[i] += weight * value;
        stepped[i] += steps * value;
        largest[i].take(value, p);
      };
      if (whole) {
        const simt::Vector<T> x = simt::load_vector(row + first);
        for (int i = 0; i < vector; ++i) take(i, x.at[i]);
      } else {
        for (int i = 0; i < vector; ++i) {
          const int c = first + i * step;
          if (c < columns) take(i, row[c]);
        }
      }
    }
    if (sums.partial) add_warps(plain, plain_total);
    if (args.stepped) add_warps(stepped, stepped_total);
  }
  if (args.largest) {
    for (int i = 0; i < vector; ++i) {
      of_warp[warp][first + i * step] = largest[i].value;
      where[warp][first + i * step] = largest[i].position;
    }
    __syncthreads();
  }
  if (own >= columns) return;
  const int64_t to = blockIdx.x * rows.segments.dim + tile + own;
  if (sums.partial) sums.partial[to] = plain_total;
  if (args.stepped) args.stepped[to] = stepped_total;
  if (args.largest) {
    Largest<A> all = {of_warp[0][own], where[0][own]};
    for (int w = 1; w < kWarps; ++w) all.merge({of_warp[w][own], where[w][own]});
    args.largest[to] = all.value;
    args.where[to] = all.position;
  }
}

// Maximum of a segment's chunks of a column.
template <class T>
__device__ inline Largest<Accumulator<T>> largest_of_chunks(const SegmentPoolModesArgs<T>& args,
                                                            int64_t b, const Positions& range,
                                                            int64_t column) {
  const Slots slots = slots_of(args.sums, b, range);
  Largest<Accumulator<T>> all = {0, -1};
  for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
    const int64_t at = slot * args.sums.rows.segments.dim + column;
    all.merge({args.largest[at], args.where[at]});
  }
  return all;
}

// Grid (batch). Each mode in its turn.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_modes(SegmentPoolModesArgs<T> args) {
  using A = Accumulator<T>;
  const SegmentRows<T>& rows = args.sums.rows;
  const int64_t b = blockIdx.x, dim = rows.segments.dim;
  for (int64_t m = 0; m < args.modes.count; ++m) {
    const PoolMode mode = args.modes.at[m];
    const Positions range = pooled_range(rows, b, mode);
    const A factor = inverse_divisor(total_weight<kWarps>(rows, range, mode), mode);
    for (int64_t c = threadIdx.x; c < dim; c += kThreads) {
      A pooled = 0;
      if (mode == PoolMode::max) {
        const Largest<A> all = largest_of_chunks(args, b, range, c);
        pooled = all.value;
        args.argmax[b * dim + c] = all.position;
      } else if (weighs_tokens(mode)) {
        const A* partial = mode == PoolMode::weighted_mean ? args.stepped : args.sums.partial;
        pooled = sum_of_chunks(args.sums, partial, b, range, c);
      } else if (range.begin < range.end) {
        pooled += simt::to_accumulator(row_start(rows.segments, row_of(rows, range.begin))[c]);
      }
      const int64_t to = (b * args.modes.count + m) * dim + c;
      store_pooled<T>(args.wide, factor == 0 ? A(0) : factor * pooled, args.out, to);
    }
  }
}

}  // namespace emblas::cuda
