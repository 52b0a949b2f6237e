// Summed vocabulary pooling on a GPU; the formulas stand in python/emblas/pooling/op_vocab_sum.py.
//
// Both directions make the logits a tile at a time, by torch's matrix product.
//
// Forward. A segment is cut into chunks of kChunkRows tokens counted from its own first one, and a
// chunk belongs to the tile that it begins in: a tile has some rows more than its own, so that the
// order of additions depends on the segment's length only. `sum_chunk_of_tile` applies the
// activation and adds up: a block owns a chunk and 32 vectors of words, its warps take turns at the
// rows. `add_chunks_of_words` adds the chunks of a segment in order.
//
// Backward. `write_owners` finds the segment of each token. `tile_slopes` replaces the logits of a
// tile by their gradients, in place, and adds them up for the bias; two products of torch's make of
// them the gradients of the tile's tokens and words, and `add_to_sum` adds those of one tile after
// the other, in accumulators. Tokens of no segment may hold anything: `copy_owned` makes a copy of
// x that has zeros there.
//
// Bytes: a tile, which the second-level cache holds, once in forward and three times in backward.
// The products are the limit; for 16-bit inputs their results are rounded to 16 bits.
#pragma once

#include "pooling/segments_cuda.cuh"
#include "pooling/vocab_sum_cuda.h"

namespace emblas::cuda {

inline constexpr int kSumWarps = 8;
inline constexpr int kSumThreads = 32 * kSumWarps;

template <class A>
__device__ inline A activate(A x, int64_t activation) {
  if (activation > 0) x = x < 0 ? A(0) : x;  // NaN stays
  for (int64_t i = 1; i < activation; ++i) x = log1p(x);
  return x;
}
template <class A>
__device__ inline A slope_at(A x, int64_t activation) {
  if (activation == 0) return 1;
  A slope = x > 0 ? A(1) : A(0), inner = activate(x, 1);
  for (int64_t i = 1; i < activation; ++i) {
    slope /= 1 + inner;
    inner = log1p(inner);
  }
  return slope;
}

// The i-th of the columns of a block that a lane owns: a vector where rows are `aligned`.
template <bool aligned, int vector>
__device__ inline int column_of(int i) {
  const int lane = threadIdx.x % 32;
  return aligned ? lane * vector + i : lane + 32 * i;
}

// The lane's columns of a row; 0 from `columns` on.
template <bool aligned, int vector, class T>
__device__ inline void load_each(const T* row, int64_t columns, Accumulator<T> (&to)[vector]) {
  for (int i = 0; i < vector; ++i) {
    const int c = column_of<aligned, vector>(i);
    to[i] = c < columns ? simt::to_accumulator(row[c]) : Accumulator<T>(0);
  }
}
// The same, 16 bytes at a time where rows are aligned: then they consist of whole vectors.
template <bool aligned, class T>
__device__ inline void load_columns(const T* row, int64_t columns,
                                    Accumulator<T> (&to)[simt::kVector<T>]) {
  constexpr int vector = simt::kVector<T>;
  const int first = column_of<aligned, vector>(0);
  if (aligned && first < columns) {
    const simt::Vector<T> values = simt::load_vector(row + first);
    for (int i = 0; i < vector; ++i) to[i] = simt::to_accumulator(values.at[i]);
  } else {
    load_each<aligned, vector>(row, columns, to);
  }
}
template <bool aligned, class T>
__device__ inline void store_columns(const Accumulator<T> (&from)[simt::kVector<T>],
                                     int64_t columns, T* row) {
  constexpr int vector = simt::kVector<T>;
  const int first = column_of<aligned, vector>(0);
  if constexpr (aligned) {
    if (first >= columns) return;
    simt::Vector<T> values;
    for (int i = 0; i < vector; ++i) simt::from_accumulator(from[i], &values.at[i]);
    simt::store_vector(row + first, values);
  } else {
    for (int i = 0; i < vector; ++i) {
      const int c = column_of<aligned, vector>(i);
      if (c < columns) simt::from_accumulator(from[i], row + c);
    }
  }
}

// to[c] = the sum over the warps of what they have of column c.
template <bool aligned, int vector, class A>
__device__ inline void add_warps(const A (&sum)[vector], int64_t columns, A* to) {
  SIMT_SHARED(A, of_warp, [kSumWarps][32 * vector]);
  for (int i = 0; i < vector; ++i) {
    of_warp[threadIdx.x / 32][column_of<aligned, vector>(i)] = sum[i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kSumThreads) {
    A total = 0;
    for (int w = 0; w < kSumWarps; ++w) total += of_warp[w][c];
    to[c] = total;
  }
}

// Grid (chunks that may begin in the tile, blocks of words). `aligned`: rows of logits start at
// multiples of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kSumThreads)
    sum_chunk_of_tile(SegmentRows<T> rows, LogitTile<T> tile, Activated<T> activated,
                      Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>, width = 32 * vector;
  const int64_t slot = tile.first_token / kChunkRows + blockIdx.x;
  const Positions range = chunk_of_slot(rows, slot, PoolMode::sum).range;
  if (range.begin == range.end) return;  // the whole block
  if (range.begin < tile.first_token || range.begin >= tile.last_token) return;
  const int64_t first_column = int64_t(blockIdx.y) * width;
  const int64_t columns = min(tile.words - first_column, int64_t(width));
  A shift[vector] = {}, sum[vector] = {};
  if (activated.bias) {
    load_each<aligned, vector>(activated.bias + tile.first_word + first_column, columns, shift);
  }
#pragma unroll 1
  for (int64_t p = range.begin + threadIdx.x / 32; p < range.end; p += kSumWarps) {
    if (rows.segments.weights && rows.segments.weights[p] == 0) continue;
    A logits[vector];
    load_columns<aligned>(tile.logits + (p - tile.first_token) * tile.words + first_column, columns,
                          logits);
#pragma unroll  // or ptxas would index the arrays, in local memory
    for (int i = 0; i < vector; ++i) sum[i] += activate(logits[i] + shift[i], activated.activation);
  }
  add_warps<aligned>(sum, columns, partial + slot * tile.words + first_column);
}

// Sum of `count` rows of partial sums.
template <class A>
__device__ inline A sum_of_partial(const A* column, int64_t count, int64_t words) {
  A sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += column[k * words];
  return sum;
}

// Grid (batch, blocks of words).
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    add_chunks_of_words(SegmentRows<T> rows, const Accumulator<T>* partial, int64_t words,
                        int64_t vocab, Accumulator<T>* out) {
  const int64_t word = int64_t(blockIdx.y) * kSumThreads + threadIdx.x;
  if (word >= words) return;
  const Positions range = positions_of(rows, blockIdx.x);
  const int64_t chunks = (range.end - range.begin + kChunkRows - 1) / kChunkRows;
  const Accumulator<T>* first = partial + first_slot(rows, blockIdx.x) * words + word;
  out[blockIdx.x * vocab + word] = sum_of_partial(first, chunks, words);
}

// Blocks of tokens.
template <class T>
__global__ void __launch_bounds__(kSumThreads) write_owners(SegmentRows<T> rows, int32_t* owner) {
  const int64_t p = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (p >= rows.positions) return;
  const Segments<T>& segments = rows.segments;
  int64_t low = 0, high = rows.batch;  // the segments that begin at or before it
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (segments.begins[middle] <= p) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool absent = segments.weights && segments.weights[p] == 0;
  // The others are over, or empty.
  owner[p] = low > 0 && p < segments.ends[low - 1] && !absent ? int32_t(low - 1) : -1;
}

// Blocks of elements.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    copy_owned(const T* x, const int32_t* owner, int64_t tokens, int64_t dim, T* to) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i < tokens * dim) to[i] = owner[i / dim] < 0 ? T{} : x[i];
}

// Grid (chunks of the tile's rows, blocks of words). `aligned`: rows of logits start at multiples
// of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kSumThreads, 3) tile_slopes(TileGradients<T> args) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>, width = 32 * vector;
  const LogitTile<T>& tile = args.tile;
  const int64_t first_column = int64_t(blockIdx.y) * width;
  const int64_t columns = min(tile.words - first_column, int64_t(width));
  const int64_t first_word = tile.first_word + first_column;
  A shift[vector] = {}, sum[vector] = {};
  if (args.activated.bias) {
    load_each<aligned, vector>(args.activated.bias + first_word, columns, shift);
  }
  const int64_t begin = tile.first_token + blockIdx.x * kChunkRows;
  const int64_t end = min(begin + kChunkRows, tile.last_token);
#pragma unroll 1
  for (int64_t p = begin + threadIdx.x / 32; p < end; p += kSumWarps) {
    T* row = args.logits + (p - tile.first_token) * tile.words + first_column;
    const int64_t b = args.owner[p];
    A gradients[vector] = {};
    if (b >= 0) {
      A logits[vector];
      load_columns<aligned>(row, columns, logits);
      load_each<aligned, vector>(args.grad_out + b * args.vocab + first_word, columns, gradients);
#pragma unroll  // as above
      for (int i = 0; i < vector; ++i) {
        gradients[i] *= slope_at(logits[i] + shift[i], args.activated.activation);
        sum[i] += gradients[i];
      }
    }
    store_columns<aligned>(gradients, columns, row);
  }
  if (!args.partial) return;
  const int64_t chunk = begin / kChunkRows;
  add_warps<aligned>(sum, columns, args.partial + chunk * tile.words + first_column);
}

// Blocks of words.
template <class A>
__global__ void __launch_bounds__(kSumThreads)
    add_bias_chunks(const A* partial, int64_t chunks, int64_t words, A* grad_bias) {
  const int64_t word = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (word < words) grad_bias[word] = sum_of_partial(partial + word, chunks, words);
}

// Blocks of elements.
template <class T>
__global__ void __launch_bounds__(kSumThreads) add_to_sum(ProductSum<T> args) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= args.size) return;
  Accumulator<T> sum = simt::to_accumulator(args.product[i]);
  if (!args.first) sum += args.sum[i];
  if (args.last) {
    simt::from_accumulator(sum, args.out + i);
  } else {
    args.sum[i] = sum;
  }
}

}  // namespace emblas::cuda
