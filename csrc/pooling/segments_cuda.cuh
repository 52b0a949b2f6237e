// Where the rows of a segment are, on a GPU: as segments.h says, and inside the arguments whatever
// the tensors hold.
#pragma once

#include "common/cuda/simt.h"
#include "pooling/pooling_cuda.h"

namespace emblas::cuda {

struct Positions {
  int64_t begin, end;
};
template <class T>
__device__ inline Positions positions_of(const SegmentRows<T>& rows, int64_t b) {
  const Segments<T>& segments = rows.segments;
  const int64_t skipped = segments.skip ? segments.skip[b] : 0;
  int64_t begin = segments.begins[b] + skipped, end = segments.ends[b];
  begin = min(max(begin, int64_t(0)), rows.positions);
  end = min(max(end, begin), rows.positions);
  return {begin, end};
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

}  // namespace emblas::cuda
