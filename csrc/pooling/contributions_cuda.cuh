// What the first kernel of each gradient leaves behind of a segment, by all threads of its block.
#pragma once

#include "pooling/segment_sums_cuda.cuh"

namespace emblas::cuda {

template <class T>
__device__ inline void keep_range(const Contributions<T>& parts, int64_t b,
                                  const Positions& range) {
  if (threadIdx.x == 0) {
    parts.begin[b] = int32_t(range.begin);
    parts.end[b] = int32_t(range.end);
  }
  if (!parts.owner) return;
  for (int64_t p = range.begin + threadIdx.x; p < range.end; p += kThreads) {
    parts.owner[p] = int32_t(b) + 1;
  }
}

// Adds up to a hash of a row, in any order.
__device__ inline uint64_t hash_of(float x, int64_t column) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits * (2654435761u * uint64_t(column) + 1);
}
__device__ inline uint64_t hash_of(double x, int64_t column) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits * (2654435761u * uint64_t(column) + 1);
}

// What tells segments of the same range apart: the hash of their rows, and where positions count
// from.
template <class T>
__device__ inline void keep_fingerprint(const Contributions<T>& parts, int64_t b, uint64_t hash) {
  if (!parts.fingerprint) return;
  hash = simt::block_sum<kWarps>(hash);
  if (threadIdx.x == 0) {
    parts.fingerprint[b] = int64_t(hash) - parts.rows.segments.begins[b];
  }
}

}  // namespace emblas::cuda
