// Maximum of each column of a segment on a GPU, and the first row that holds it; NaN is larger than
// any number.
//
// Forward. A block owns a segment and 32 vectors of columns. Its warps take turns at the rows, with
// 16-byte loads that are contiguous over a warp, and keep the largest values and their positions in
// registers; in the end these are compared, the earlier position first. Bytes: x once, out and
// argmax; bound by memory bandwidth.
//
// Backward. `argmax` says where each gradient goes. Segments may share rows, so a thread looks for
// all gradients of its column that go where its own go, adds them in the order of segments, and
// the first of those segments writes, into zeros. That is batch^2 comparisons of a column, of rows
// of argmax that the L2 cache keeps; no atomics, and nothing to sort.
#pragma once

#include "pooling/segments_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kMaxWarps = 8;
inline constexpr int kMaxThreads = 32 * kMaxWarps;
inline constexpr int kOwnSegments = 8;  // of a thread of scatter_maxima

template <class A>
struct Largest {
  A value;
  int32_t position;  // -1: none yet

  // Takes a value at a later position.
  __device__ void take(A other, int64_t at) {
    if (position < 0 || other > value || (other != other && value == value)) {
      value = other;
      position = int32_t(at);
    }
  }
  // Takes what others found at any positions.
  __device__ void merge(const Largest& other) {
    if (other.position < 0) return;
    const bool equal = other.value == value || (other.value != other.value && value != value);
    if (equal && other.position < position) position = other.position;
    take(other.value, other.position);
  }
};

// Grid (segments, tiles of columns). `aligned`: rows start at multiples of 16 bytes, so a lane's
// columns are one vector.
template <class T, bool aligned>
__global__ void __launch_bounds__(kMaxThreads, 3)
    find_maxima(SegmentRows<T> rows, T* out, int32_t* argmax) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>, tile = 32 * vector;
  SIMT_SHARED(Largest<A>, of_warp, [kMaxWarps][tile]);
  const Segments<T>& segments = rows.segments;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_column = int64_t(blockIdx.y) * tile;
  const int64_t columns = min(segments.dim - first_column, int64_t(tile));
  // The lane's i-th column in the tile is first + i * step.
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const bool whole = aligned && first + vector <= columns;
  const Positions range = positions_of(rows, blockIdx.x);
  Largest<A> largest[vector];
  for (Largest<A>& none : largest) none = {0, -1};
#pragma unroll 2  // more than that spills registers on sm_120
  for (int64_t p = range.begin + warp; p < range.end; p += kMaxWarps) {
    if (segments.weights && segments.weights[p] == 0) continue;
    const T* row = row_start(segments, row_of(rows, p)) + first_column;
    if (whole) {
      const simt::Vector<T> x = simt::load_vector(row + first);
      for (int i = 0; i < vector; ++i) largest[i].take(simt::to_accumulator(x.at[i]), p);
    } else {
      for (int i = 0; i < vector; ++i) {
        const int c = first + i * step;
        if (c < columns) largest[i].take(simt::to_accumulator(row[c]), p);
      }
    }
  }
  for (int i = 0; i < vector; ++i) of_warp[warp][first + i * step] = largest[i];
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kMaxThreads) {
    Largest<A> all = of_warp[0][c];
    for (int w = 1; w < kMaxWarps; ++w) all.merge(of_warp[w][c]);
    const int64_t to = blockIdx.x * segments.dim + first_column + c;
    simt::from_accumulator(all.value, out + to);
    argmax[to] = all.position < 0 ? -1 : int32_t(row_of(rows, all.position));
  }
}

// Grid (groups of kOwnSegments segments, blocks of columns); grad_x holds zeros.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    scatter_maxima(const T* grad_out, const int32_t* argmax, int64_t batch, int64_t rows,
                   int64_t dim, T* grad_x) {
  const int64_t first = int64_t(blockIdx.x) * kOwnSegments;
  const int64_t column = int64_t(blockIdx.y) * kMaxThreads + threadIdx.x;
  if (column >= dim) return;
  int32_t row[kOwnSegments];
  bool writes[kOwnSegments];
  Accumulator<T> total[kOwnSegments] = {};
  for (int k = 0; k < kOwnSegments; ++k) {
    row[k] = first + k < batch ? argmax[(first + k) * dim + column] : -1;
    writes[k] = row[k] >= 0 && row[k] < rows;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t other = argmax[b * dim + column];
    for (int k = 0; k < kOwnSegments; ++k) {
      if (other != row[k]) continue;
      total[k] += simt::to_accumulator(grad_out[b * dim + column]);
      if (b < first + k) writes[k] = false;
    }
  }
  for (int k = 0; k < kOwnSegments; ++k) {
    if (writes[k]) simt::from_accumulator(total[k], grad_x + row[k] * dim + column);
  }
}

}  // namespace emblas::cuda
