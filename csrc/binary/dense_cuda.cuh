// Scores of real-valued vectors on a GPU, and the best of them: inner product, the same over the
// length of the row, or minus the squared distance.
//
// As in hamming_cuda.cuh a block brings tiles of 256 rows to shared memory, 64 bytes of each at a
// time; a thread multiplies its row with 1 or 4 queries, in float, in order, so that a score
// depends on its row and its query only. Then each warp offers the scores of one query and one
// range of rows to its list.
//
// Bytes: the rows once for all queries of a block. Multiplying in float (128 per clock and
// multiprocessor) is the limit for batches, memory bandwidth for one query.
#pragma once

#include "binary/codes_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kDenseBytes = 64;  // of each row at a time
inline constexpr int kDensePieces = kDenseBytes / 16;

struct DenseScanArgs {
  CodeRows documents;  // strides in bytes
  int bytes;           // of a row
  const float* queries;
  int64_t query_stride, query_count;
  int64_t dim;
  Metric metric;
  unsigned groups;  // of queries
  int64_t tiles_per_list, lists;
  Places places;
};

template <class T>
__device__ inline float real(T x) {
  return simt::to_accumulator(x);
}
template <>
__device__ inline float real(int8_t x) {
  return float(x);
}

__device__ inline float score_of(Metric metric, float dot, float row_square, float query_square) {
  if (metric == Metric::cosine) return row_square > 0 ? dot / sqrtf(row_square) : 0;
  if (metric == Metric::l2) return 2 * dot - row_square - query_square;
  return dot;
}

// Grid (groups of queries * groups of lists); blocks that run at the same time share rows.
template <class T, int queries, int unit, class Sink>
__global__ void __launch_bounds__(kSearchThreads, 2) scan_dense(DenseScanArgs args, Sink sink) {
  constexpr int lists = kSearchWarps / queries;  // of the block, for each query
  constexpr int values = simt::kVector<T>, slab = kDensePieces * values;
  SIMT_SHARED(uint4, tile, [kTileRows][kDensePieces + 1]);
  SIMT_SHARED(float, wanted, [queries][slab]);
  SIMT_SHARED(float, query_squares, [queries]);
  SIMT_SHARED(unsigned, distances, [kSearchWarps][kTileRows]);
  SIMT_SHARED(typename Sink::State, states, [kSearchWarps]);
  static_assert(queries * slab <= kSearchThreads);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t first_query = int64_t(blockIdx.x % args.groups) * queries;
  const int64_t first_list = int64_t(blockIdx.x / args.groups) * lists;
  const int64_t query = first_query + warp / lists, list = first_list + warp % lists;
  const auto query_values = [&](int q) {  // beyond the end the last one stands in
    const int64_t other = min(first_query + q, args.query_count - 1);
    return args.queries + other * args.query_stride;
  };
  if (warp < queries) {
    float square = 0;
    for (int64_t i = lane; i < args.dim; i += 32) {
      square += query_values(warp)[i] * query_values(warp)[i];
    }
    square = simt::warp_sum(square);
    if (lane == 0) query_squares[warp] = square;
  }

  for (int64_t t = 0; t < args.tiles_per_list; ++t) {
    for (int part = 0; part < lists; ++part) {
      const int64_t first_place = ((first_list + part) * args.tiles_per_list + t) * kTileRows;
      float dot[queries] = {}, square = 0;
      int offset = 0;
      do {
        const int left = args.bytes - offset;
        const int pieces = left < kDenseBytes ? (left + 15) / 16 : kDensePieces;
        load_codes<unit>(args.documents, args.places, first_place, args.bytes, offset, pieces,
                         tile);
        if (thread < queries * slab) {
          const int64_t i = offset / int(sizeof(T)) + thread % slab;
          wanted[thread / slab][thread % slab] = i < args.dim ? query_values(thread / slab)[i] : 0;
        }
        __syncthreads();
#pragma unroll 1  // registers
        for (int p = 0; p < pieces; ++p) {
          const simt::Vector<T> x = simt::load_vector(reinterpret_cast<const T*>(&tile[thread][p]));
          for (int i = 0; i < values; i += 4) {
            for (int j = 0; j < 4; ++j) square += real(x.at[i + j]) * real(x.at[i + j]);
            for (int q = 0; q < queries; ++q) {
              const simt::Vector<float> y = simt::load_vector(&wanted[q][p * values + i]);
              for (int j = 0; j < 4; ++j) dot[q] += real(x.at[i + j]) * y.at[j];
            }
          }
        }
        offset += kDenseBytes;
        if (offset >= args.bytes) {
          for (int q = 0; q < queries; ++q) {
            const float score = score_of(args.metric, dot[q], square, query_squares[q]);
            distances[q * lists + part][thread] = distance_of_score(score);
          }
        }
        __syncthreads();
      } while (offset < args.bytes);
    }
    if (query < args.query_count && list < args.lists) {
      sink.take(args, query, list, t, distances[warp], states[warp]);
    }
  }
}

// Scores of each query with rows of its own, a warp for each pair: reads these rows, 16 bytes at a
// time where they are `aligned`, and is bound by memory. Grid (ceil(queries * count /
// kSearchWarps)).
template <class T, bool aligned>
__global__ void __launch_bounds__(kSearchThreads)
    gather_rows(DenseArgs<T> args, const int64_t* ids, int64_t pairs, int64_t count, int64_t rows,
                float* scores) {
  constexpr int values = simt::kVector<T>;
  const int lane = threadIdx.x % 32;
  const int64_t own = int64_t(blockIdx.x) * kSearchWarps + threadIdx.x / 32;
  if (own >= pairs) return;
  const int64_t id = ids[own];
  const bool exists = id >= 0 && id < rows;
  const T* row = args.documents + (exists ? id : 0) * args.stride;
  const float* query = args.queries + own / count * args.query_stride;
  float dot = 0, row_square = 0, query_square = 0;
  const auto add = [&](T value, float wanted) {
    const float x = real(value);
    dot += x * wanted;
    row_square += x * x;
    query_square += wanted * wanted;
  };
  for (int64_t c = lane * values; exists && c < args.dim; c += 32 * values) {
    if (aligned && c + values <= args.dim) {
      const simt::Vector<T> x = simt::load_vector(row + c);
      for (int i = 0; i < values; ++i) add(x.at[i], query[c + i]);
    } else {
      for (int i = 0; i < values && c + i < args.dim; ++i) add(row[c + i], query[c + i]);
    }
  }
  dot = simt::warp_sum(dot);
  row_square = simt::warp_sum(row_square);
  query_square = simt::warp_sum(query_square);
  if (lane > 0) return;
  scores[own] = exists ? score_of(args.metric, dot, row_square, query_square) : -INFINITY;
}

}  // namespace emblas::cuda
