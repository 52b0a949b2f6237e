// Segment pooling on a GPU; the formulas stand in pooling.h.
//
// Forward, two kernels. A segment is cut into chunks of kChunkRows rows counted from its own first
// row, so the order of additions depends on the segment's length only. `sum_chunks` reads x once,
// with 16-byte loads that are contiguous over a warp, and writes one partial sum per chunk and
// column; `finish_means` adds a segment's partial sums in order, divides and normalizes. Long and
// short segments thus give blocks of equal work. Bytes: x once, plus 2 / kChunkRows of it (in
// accumulators) for the partial sums; bound by memory bandwidth.
//
// Backward, two kernels. `mean_gradients` makes dm_b once per segment, `token_gradients` writes
// w_t / W_b dm_b to each row (and reads x only for the gradient of the weights): a warp per row,
// dm_b comes from the first-level cache. Bytes: grad_x once, x once if asked for.
//
// Which chunk is a block's? Segment b starts at slot begin_b / kChunkRows + b. It needs
// ceil(length / kChunkRows) slots and the next segment starts no earlier, so slots are unique and
// their number, tokens / kChunkRows + batch, follows from shapes: the host knows the grid without
// reading offsets. A block finds its segment by binary search; a few slots stay idle.
//
// Offsets are clamped to [0, tokens]: whatever cu_seqlens holds, all accesses are in bounds.
#pragma once

#include "common/cuda/simt.h"
#include "pooling/pooling_cuda.h"

namespace emblas::cuda {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;

struct Rows {
  int64_t begin, end;
};

__device__ inline int64_t clamp_offset(int64_t offset, int64_t tokens) {
  return min(max(offset, int64_t(0)), tokens);
}
__device__ inline Rows segment_rows(const int32_t* cu_seqlens, int64_t b, int64_t tokens) {
  const int64_t begin = clamp_offset(cu_seqlens[b], tokens);
  const int64_t end = clamp_offset(cu_seqlens[b + 1], tokens);
  return {begin, max(begin, end)};
}
__device__ inline int64_t first_slot(int64_t begin, int64_t b) { return begin / kChunkRows + b; }

struct Chunk {
  int64_t segment;
  Rows rows;  // empty in an idle slot
};
__device__ inline Chunk chunk_of_slot(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                                      int64_t slot) {
  int64_t low = 0, high = batch - 1;  // the last segment that starts at or before the slot
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_slot(clamp_offset(cu_seqlens[middle], tokens), middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Rows all = segment_rows(cu_seqlens, low, tokens);
  const int64_t skipped = (slot - first_slot(all.begin, low)) * kChunkRows;
  if (skipped < 0) return {low, {0, 0}};  // before the first segment
  const int64_t begin = min(all.begin + skipped, all.end);
  return {low, {begin, min(begin + kChunkRows, all.end)}};
}

template <class A>
__device__ A total_weight(const A* weights, Rows rows) {
  if (!weights) return A(rows.end - rows.begin);
  A total = 0;
  for (int64_t t = rows.begin + threadIdx.x; t < rows.end; t += kThreads) total += weights[t];
  return simt::block_sum<kWarps>(total);
}

// Columns of one block of sum_chunks.
template <class T>
inline constexpr int kTileColumns = 32 * simt::kVector<T>;

// Grid (slots, tiles of columns); partial [slots, dim]. A warp takes every kWarps-th row of the
// chunk. `aligned`: rows start at multiples of 16 bytes, so a lane's columns are one vector.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    sum_chunks(SegmentPoolArgs<T> args, int64_t batch, int64_t tokens, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>;
  SIMT_SHARED(A, of_warp, [kWarps][kTileColumns<T>]);
  const Chunk chunk = chunk_of_slot(args.cu_seqlens, batch, tokens, blockIdx.x);
  if (chunk.rows.begin == chunk.rows.end) return;  // the whole block

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = int64_t(blockIdx.y) * kTileColumns<T>;
  const int64_t columns = min(args.dim - tile, int64_t(kTileColumns<T>));
  // The lane's i-th column in the tile is first + i * step.
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const bool whole = aligned && first + vector <= columns;
  A sum[vector] = {};
#pragma unroll 4
  for (int64_t t = chunk.rows.begin + warp; t < chunk.rows.end; t += kWarps) {
    const A weight = args.weights ? args.weights[t] : A(1);
    if (weight == 0) continue;  // a masked row may hold anything, NaN included
    const T* row = args.x + t * args.row_stride + tile;
    if (whole) {
      const simt::Vector<T> x = simt::load_vector(row + first);
      for (int i = 0; i < vector; ++i) sum[i] += weight * simt::to_accumulator(x.at[i]);
    } else {
      for (int i = 0; i < vector; ++i) {
        const int c = first + i * step;
        if (c < columns) sum[i] += weight * simt::to_accumulator(row[c]);
      }
    }
  }
  for (int i = 0; i < vector; ++i) of_warp[warp][first + i * step] = sum[i];
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    A total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warp[w][c];
    partial[blockIdx.x * args.dim + tile + c] = total;
  }
}

// Grid (batch). A thread owns the columns threadIdx.x + i * kThreads; it keeps their sums in the
// segment's first partial row while the norm is being found.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_means(SegmentPoolArgs<T> args, int64_t tokens, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x;
  const Rows rows = segment_rows(args.cu_seqlens, b, tokens);
  const int64_t chunks = (rows.end - rows.begin + kChunkRows - 1) / kChunkRows;
  partial += first_slot(rows.begin, b) * args.dim;
  const A total = total_weight(args.weights, rows);
  A factor = total == 0 ? A(0) : 1 / total;
  A square = 0;
  for (int64_t c = threadIdx.x; c < args.dim; c += kThreads) {
    A sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k * args.dim + c];
    partial[c] = sum;  // an empty segment has a row too
    square += sum * sum;
  }
  if (args.normalize) {
    square = simt::block_sum<kWarps>(square);
    const A norm = sqrt(square) * fabs(factor);
    if (args.norm && threadIdx.x == 0) args.norm[b] = norm;
    factor /= max(norm, A(kNormalizeEpsilon));
  }
  for (int64_t c = threadIdx.x; c < args.dim; c += kThreads) {
    const A mean = total == 0 ? A(0) : factor * partial[c];
    simt::from_accumulator(mean, args.out + b * args.dim + c);
  }
}

// Scratch of the backward: [batch, dim] dm_b, [batch] 1 / W_b (0 where W_b == 0), [batch] m_b .
// dm_b.
template <class A>
struct MeanGradients {
  A* gradient;
  A* share;
  A* along_mean;
};

// Grid (batch).
template <class T>
__global__ void __launch_bounds__(kThreads)
    mean_gradients(SegmentPoolBackwardArgs<T> args, int64_t tokens,
                   MeanGradients<Accumulator<T>> means) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x;
  const A total = total_weight(args.weights, segment_rows(args.cu_seqlens, b, tokens));
  if (threadIdx.x == 0) means.share[b] = total == 0 ? A(0) : 1 / total;
  const T* grad_out = args.grad_out + b * args.dim;
  const T* out = args.out + b * args.dim;
  A length = 1, removed = 0;
  bool project = false;
  if (args.normalize) {
    project = args.norm[b] > A(kNormalizeEpsilon);
    length = project ? args.norm[b] : A(kNormalizeEpsilon);
    A along = 0;
    for (int64_t c = threadIdx.x; c < args.dim; c += kThreads) {
      along += simt::to_accumulator(out[c]) * simt::to_accumulator(grad_out[c]);
    }
    along = simt::block_sum<kWarps>(along);
    removed = project ? along : A(0);
  }
  A along_mean = 0;
  for (int64_t c = threadIdx.x; c < args.dim; c += kThreads) {
    const A value = simt::to_accumulator(out[c]);
    const A gradient = (simt::to_accumulator(grad_out[c]) - removed * value) / length;
    means.gradient[b * args.dim + c] = gradient;
    along_mean += value * gradient;
  }
  along_mean = simt::block_sum<kWarps>(along_mean);
  // With a projection dm_b is orthogonal to m_b.
  if (threadIdx.x == 0) means.along_mean[b] = project ? A(0) : length * along_mean;
}

// Grid (slots). `aligned`: rows of grad_x, and of x where it is read, start at multiples of 16
// bytes and dim is a multiple of the vector.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    token_gradients(SegmentPoolBackwardArgs<T> args, int64_t batch, int64_t tokens,
                    MeanGradients<Accumulator<T>> means) {
  using A = Accumulator<T>;
  constexpr int vector = aligned ? simt::kVector<T> : 1;
  const Chunk chunk = chunk_of_slot(args.cu_seqlens, batch, tokens, blockIdx.x);
  if (chunk.rows.begin == chunk.rows.end) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const A* gradient = means.gradient + chunk.segment * args.dim;
  const A share = means.share[chunk.segment];
  const A along_mean = means.along_mean[chunk.segment];
  for (int64_t t = chunk.rows.begin + warp; t < chunk.rows.end; t += kWarps) {
    const A weight = args.weights ? args.weights[t] : A(1);
    const bool zero = share == 0 || weight == 0;
    const A factor = weight * share;
    const T* x = args.x + t * args.row_stride;
    T* grad_x = args.grad_x + t * args.dim;
    A along = 0;
#pragma unroll 2  // more than that spills registers for doubles on sm_120
    for (int64_t c = lane * vector; c < args.dim; c += 32 * vector) {
      A g[vector];
      if constexpr (aligned) {
        for (int i = 0; i < vector; i += simt::kVector<A>) {
          const simt::Vector<A> part = simt::load_vector(gradient + c + i);
          for (int j = 0; j < simt::kVector<A>; ++j) g[i + j] = part.at[j];
        }
        if (args.grad_weights) {
          const simt::Vector<T> value = simt::load_vector(x + c);
          for (int i = 0; i < vector; ++i) along += simt::to_accumulator(value.at[i]) * g[i];
        }
        if (args.grad_x) {
          simt::Vector<T> value;
          for (int i = 0; i < vector; ++i) {
            simt::from_accumulator(zero ? A(0) : factor * g[i], &value.at[i]);
          }
          simt::store_vector(grad_x + c, value);
        }
      } else {
        g[0] = gradient[c];
        if (args.grad_weights) along += simt::to_accumulator(x[c]) * g[0];
        if (args.grad_x) simt::from_accumulator(zero ? A(0) : factor * g[0], grad_x + c);
      }
    }
    if (args.grad_weights) {
      along = simt::warp_sum(along);
      if (lane == 0) args.grad_weights[t] = share == 0 ? A(0) : (along - along_mean) * share;
    }
  }
}

}  // namespace emblas::cuda
