// Sums of the rows of segments, times their weights: the first kernel of the linear modes and, of
// powers of the rows, of the generalized mean.
//
// Rows are added up in chunks of kChunkRows counted from the first one that is pooled, and chunks
// in their order, so the order of additions depends on the segment's length only. `sum_chunks`
// reads x once, with 16-byte loads that are contiguous over a warp, and writes one partial sum per
// block and column; what follows adds a segment's partial sums in order (`sum_of_chunks`). Bytes: x
// once, plus 2 / kChunkRows of it (in accumulators) for the partial sums; bound by memory
// bandwidth.
//
// Where segments come as offsets a block takes one chunk (segments_cuda.cuh): long and short
// segments give blocks of equal work.
// Spans may overlap, so nobody knows how many chunks they have: a block takes a whole segment, and
// gets the same bits.
//
// Whatever the offsets hold, all accesses are in bounds.
#pragma once

#include "pooling/segments_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;

template <class T>
__device__ Chunk chunk_of_block(const SegmentSums<T>& sums) {
  if (sums.chunked) return chunk_of_slot(sums.rows, blockIdx.x, sums.mode);
  return {blockIdx.x, pooled_range(sums.rows, blockIdx.x, sums.mode)};
}

// The slots of a segment.
struct Slots {
  int64_t begin, end;
};
template <class T>
__device__ inline Slots slots_of(const SegmentSums<T>& sums, int64_t b, const Positions& range) {
  const int64_t length = range.end - range.begin;
  const int64_t chunks = sums.chunked ? (length + kChunkRows - 1) / kChunkRows : length > 0;
  const int64_t slot = sums.chunked ? first_slot(sums.rows, b) : b;
  return {slot, slot + chunks};
}

// Sum of a segment's partial sums [slots, dim] of a column.
template <class T>
__device__ inline Accumulator<T> sum_of_chunks(const SegmentSums<T>& sums,
                                               const Accumulator<T>* partial, int64_t b,
                                               const Positions& range, int64_t column) {
  const Slots slots = slots_of(sums, b, range);
  Accumulator<T> sum = 0;
  for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
    sum += partial[slot * sums.rows.segments.dim + column];
  }
  return sum;
}

// Row of a segment in the mode of a place, among what segments contribute to gradients.
template <class T>
__device__ inline int64_t number_of(const Contributions<T>& parts, int64_t segment, int64_t place) {
  return segment * parts.modes.count + place;
}

// Columns of one block of sum_chunks.
template <class T>
inline constexpr int kTileColumns = 32 * simt::kVector<T>;
static_assert(kTileColumns<bfloat16> <= kThreads);

template <class A>
__device__ inline A raise(A x, A power, A epsilon) {
  return exp2(power * log2(x < epsilon ? epsilon : x));
}

// Grid (slots, tiles of columns). A warp takes every kWarps-th row of a chunk. `aligned`: rows
// start at multiples of 16 bytes, so a lane's columns are one vector. `powers`: of the rows.
template <class T, bool aligned, bool powers>
__global__ void __launch_bounds__(kThreads, 3) sum_chunks(SegmentSums<T> sums) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>;
  SIMT_SHARED(A, of_warp, [kWarps][kTileColumns<T>]);
  const SegmentRows<T>& rows = sums.rows;
  const Chunk chunk = chunk_of_block(sums);
  if (chunk.range.begin == chunk.range.end) return;  // the whole block

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = int64_t(blockIdx.y) * kTileColumns<T>;
  const int64_t columns = min(rows.segments.dim - tile, int64_t(kTileColumns<T>));
  // The lane's i-th column in the tile is first + i * step.
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const bool whole = aligned && first + vector <= columns;
  const A power = powers ? *sums.power : A(1);
  const auto value = [&](T x) {
    const A wide = simt::to_accumulator(x);
    return powers ? raise(wide, power, sums.epsilon) : wide;
  };
  A total = 0;  // of the column threadIdx.x
  for (int64_t begin = chunk.range.begin; begin < chunk.range.end; begin += kChunkRows) {
    const int64_t end = min(begin + kChunkRows, chunk.range.end);
    A sum[vector] = {};
#pragma unroll(powers ? 1 : 4)
    for (int64_t p = begin + warp; p < end; p += kWarps) {
      const A weight = weight_at(rows, chunk.range.origin, p, sums.mode);
      if (weight == 0) continue;  // a masked row may hold anything, NaN included
      const T* row = row_start(rows.segments, row_of(rows, p)) + tile;
      if (whole) {
        const simt::Vector<T> x = simt::load_vector(row + first);
        for (int i = 0; i < vector; ++i) sum[i] += weight * value(x.at[i]);
      } else {
        for (int i = 0; i < vector; ++i) {
          const int c = first + i * step;
          if (c < columns) sum[i] += weight * value(row[c]);
        }
      }
    }
    for (int i = 0; i < vector; ++i) of_warp[warp][first + i * step] = sum[i];
    __syncthreads();
    if (threadIdx.x < columns) {
      A of_chunk = 0;
      for (int w = 0; w < kWarps; ++w) of_chunk += of_warp[w][threadIdx.x];
      total += of_chunk;
    }
    __syncthreads();  // the next chunk writes there
  }
  if (threadIdx.x < columns) {
    sums.partial[blockIdx.x * rows.segments.dim + tile + threadIdx.x] = total;
  }
}

template <bool powers, class T>
void launch_sums(const SegmentSums<T>& sums, void* stream) {
  const int64_t dim = sums.rows.segments.dim;
  const dim3 grid(unsigned(sums.slots()), unsigned((dim + kTileColumns<T> - 1) / kTileColumns<T>));
  if (sums.rows.batch == 0 || sums.rows.positions == 0) return;
  const auto kernel =
      aligned_rows(sums.rows.segments) ? sum_chunks<T, true, powers> : sum_chunks<T, false, powers>;
  simt::launch(kernel, grid, kThreads, 0, stream, sums);
}

}  // namespace emblas::cuda
