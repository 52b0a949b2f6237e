// Attention pooling on a GPU; the formulas stand in attention_pool.h.
//
// A segment is cut into parts of kChunkRows positions counted from its own first one, so the order
// of additions depends on the segment's length only; segments_cuda.cuh says how a block finds
// its part. A block owns a part and up to four queries. It takes as many rows as it has warps: each
// warp scores one, then each thread adds the columns that it owns, of rows that the first-level
// cache still holds. The sums of a part stay in the first-level cache too.
//
// Forward: `attend` makes the sums of the parts, their largest scores and the sums of their
// exponentials; `merge_parts` joins those of a segment.
// Backward: `slopes` writes p_ht and scale ds_ht, and makes the sums of the parts of du_h;
// `add_parts` adds them; `row_gradients` makes dx_t of those two numbers for each query, without
// reading x.
//
// Bytes: x once (more than four queries find it in the second-level cache), grad_x once, for each
// row and query 2 numbers written and read, and 2 / kChunkRows of x (in accumulators) for the sums.
// Up to a few queries memory bandwidth is the limit, then arithmetic.
#pragma once

#include "pooling/attention_pool_cuda.h"
#include "pooling/segments_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kAttendWarps = 8;
inline constexpr int kAttendThreads = 32 * kAttendWarps;

// Columns that a thread takes at once. `aligned`: every row starts at a multiple of 16 bytes and
// consists of whole vectors.
template <class T, bool aligned>
inline constexpr int kColumns = aligned ? simt::kVector<T> : 1;

// dot[h] = row . vectors[h], over a warp.
template <class T, int heads, bool aligned>
__device__ inline void dot_products(const T* row, const Accumulator<T>* vectors, int count,
                                    int64_t dim, Accumulator<T> (&dot)[heads]) {
  using A = Accumulator<T>;
  constexpr int columns = kColumns<T, aligned>;
  for (int h = 0; h < heads; ++h) dot[h] = 0;
#pragma unroll 2  // more than that takes warps
  for (int64_t c = threadIdx.x % 32 * columns; c < dim; c += 32 * columns) {
    A x[columns], other[columns];
    load_values(row + c, x);
    for (int h = 0; h < heads; ++h) {
      if (h >= count) break;
      load_values(vectors + h * dim + c, other);
      for (int i = 0; i < columns; ++i) dot[h] += x[i] * other[i];
    }
  }
  for (int h = 0; h < heads; ++h) dot[h] = simt::warp_sum(dot[h]);
}

// Whether a token is at a position of a part.
template <class T>
__device__ inline bool is_token(const Segments<T>& segments, const Chunk& part, int64_t position) {
  return position < part.range.end && !(segments.weights && segments.weights[position] == 0);
}

// The rows that a block has at hand, one for each warp, and what they are multiplied by.
template <class A, int heads>
struct Weighted {
  int64_t row[kAttendWarps];  // -1: none
  A factor[kAttendWarps][heads];
  A shrink[heads];  // of the sums so far
};

// sums[h] = shrink[h] sums[h] + sum of factor[h] row, each thread its columns; the first sums are
// 0.
template <class T, int heads, bool aligned>
__device__ inline void add_rows(const Segments<T>& segments,
                                const Weighted<Accumulator<T>, heads>& rows, int count, bool first,
                                Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int columns = kColumns<T, aligned>;
#pragma unroll 1
  for (int64_t c = int64_t(threadIdx.x) * columns; c < segments.dim;
       c += kAttendThreads * columns) {
    A sum[heads][columns] = {};
    if (!first) {
      for (int h = 0; h < heads; ++h) {
        if (h >= count) break;
        load_values(sums + h * segments.dim + c, sum[h]);
        for (int i = 0; i < columns; ++i) sum[h][i] *= rows.shrink[h];
      }
    }
#pragma unroll 4
    for (int w = 0; w < kAttendWarps; ++w) {
      if (rows.row[w] < 0) continue;
      A x[columns];
      load_values(row_start(segments, rows.row[w]) + c, x);
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < columns; ++i) sum[h][i] += rows.factor[w][h] * x[i];
      }
    }
    for (int h = 0; h < heads; ++h) {
      if (h < count) store_values(sums + h * segments.dim + c, sum[h]);
    }
  }
}

// Grid (slots, groups of `heads` queries).
template <class T, int heads, bool aligned>
__global__ void __launch_bounds__(kAttendThreads, 2)
    attend(AttentionArgs<T> args, AttentionParts<Accumulator<T>> parts) {
  using A = Accumulator<T>;
  using Rows = Weighted<A, heads>;
  SIMT_SHARED(A, scores, [kAttendWarps][heads]);
  SIMT_SHARED(Rows, of_block, [1]);
  Rows& rows = of_block[0];
  const Segments<T>& segments = args.rows.segments;
  const Chunk part = chunk_of_slot(args.rows, blockIdx.x, PoolMode::mean);
  if (part.range.begin == part.range.end) return;  // the whole block
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_head = int64_t(blockIdx.y) * heads;
  const int count = int(min(args.heads - first_head, int64_t(heads)));
  const int64_t to = blockIdx.x * args.heads + first_head;
  A largest = -INFINITY, total = 0;  // of a lane's query, in the first warp
  for (int64_t p = part.range.begin; p < part.range.end; p += kAttendWarps) {
    A dot[heads] = {};
    if (is_token(segments, part, p + warp)) {
      dot_products<T, heads, aligned>(row_start(segments, p + warp),
                                      args.queries + first_head * segments.dim, count, segments.dim,
                                      dot);
    }
    if (lane == 0) {
      for (int h = 0; h < heads; ++h) scores[warp][h] = args.scale * dot[h];
    }
    __syncthreads();
    if (warp == 0) {  // a lane for each row and query; what is over does the same again
      const int w = lane / heads % kAttendWarps, h = lane % heads;
      const bool there = is_token(segments, part, p + w);
      const A score = scores[w][h];
      A most = there && score > largest ? score : largest;
      for (int flip = heads; flip < heads * kAttendWarps; flip *= 2) {
        const A other = __shfl_xor_sync(simt::kAllLanes, most, flip);
        most = other > most ? other : most;
      }
      const A share = there ? A(exp(score - most)) : A(0);
      const A shrink = most == largest ? A(1) : A(exp(largest - most));
      A shares = share;
      for (int flip = heads; flip < heads * kAttendWarps; flip *= 2) {
        shares += __shfl_xor_sync(simt::kAllLanes, shares, flip);
      }
      largest = most;
      total = total * shrink + shares;
      if (lane < heads * kAttendWarps) {
        if (h == 0) rows.row[w] = there ? p + w : -1;
        if (w == 0) rows.shrink[h] = shrink;
        rows.factor[w][h] = share;
      }
    }
    __syncthreads();
    add_rows<T, heads, aligned>(segments, rows, count, p == part.range.begin,
                                parts.sums + to * segments.dim);
  }
  if (int(threadIdx.x) < count) {
    parts.largest[to + lane] = largest;
    parts.total[to + lane] = total;
  }
}

// The parts of a segment and query.
struct PartsOf {
  int64_t first, number;  // the first of them in [slots, heads]; they are `heads` apart
};
template <class T>
__device__ inline PartsOf parts_of(const AttentionArgs<T>& args, int64_t b, int64_t head) {
  const Positions all = positions_of(args.rows, b);
  return {first_slot(args.rows, b) * args.heads + head,
          (all.end - all.begin + kChunkRows - 1) / kChunkRows};
}

// Grid (batch, heads).
template <class T>
__global__ void __launch_bounds__(kAttendThreads, 2)
    merge_parts(AttentionArgs<T> args, AttentionParts<Accumulator<T>> parts, Accumulator<T>* out,
                Accumulator<T>* lse) {
  using A = Accumulator<T>;
  const int64_t dim = args.rows.segments.dim;
  const PartsOf own = parts_of(args, blockIdx.x, blockIdx.y);
  A* largest_of = parts.largest + own.first;
  const A* total_of = parts.total + own.first;
  const int lane = threadIdx.x % 32;
  A largest = -INFINITY, total = 0;  // every warp finds them
  for (int64_t k = lane; k < own.number; k += 32) {
    largest = max(largest, largest_of[k * args.heads]);
  }
  for (int flip = 16; flip > 0; flip /= 2) {
    largest = max(largest, __shfl_xor_sync(simt::kAllLanes, largest, flip));
  }
  const auto factor_of = [&](int64_t k) {  // no token has been seen where the sum is 0
    const bool empty = total_of[k * args.heads] == 0;
    return empty ? A(0) : A(exp(largest_of[k * args.heads] - largest));
  };
  for (int64_t k = lane; k < own.number; k += 32) {
    total += factor_of(k) * total_of[k * args.heads];
  }
  total = simt::warp_sum(total);
  __syncthreads();
  for (int64_t k = threadIdx.x; k < own.number; k += kAttendThreads) {
    largest_of[k * args.heads] = factor_of(k);
  }
  __syncthreads();
  const int64_t to = int64_t(blockIdx.x) * args.heads + blockIdx.y;
  if (threadIdx.x == 0) lse[to] = total == 0 ? A(0) : largest + A(log(total));
  const A* sums = parts.sums + own.first * dim;
  for (int64_t c = threadIdx.x; c < dim; c += kAttendThreads) {
    A sum = 0;
#pragma unroll 2
    for (int64_t k = 0; k < own.number; ++k) {
      sum += largest_of[k * args.heads] * sums[k * args.heads * dim + c];
    }
    out[to * dim + c] = total == 0 ? A(0) : sum / total;
  }
}

// Grid (slots, groups of `heads` queries).
template <class T, int heads, bool aligned>
__global__ void __launch_bounds__(kAttendThreads, 2)
    slopes(AttentionArgs<T> args, AttentionGradients<T> gradients) {
  using A = Accumulator<T>;
  using Rows = Weighted<A, heads>;
  SIMT_SHARED(A, along, [heads]);  // d_h
  SIMT_SHARED(Rows, of_block, [1]);
  Rows& rows = of_block[0];
  const Segments<T>& segments = args.rows.segments;
  const Chunk part = chunk_of_slot(args.rows, blockIdx.x, PoolMode::mean);
  if (part.range.begin == part.range.end) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_head = int64_t(blockIdx.y) * heads, dim = segments.dim;
  const int count = int(min(args.heads - first_head, int64_t(heads)));
  const int64_t from = part.segment * args.heads + first_head;
  const A* grad_out = gradients.grad_out + from * dim;
  if (warp < count) {
    A dot[1];
    dot_products<A, 1, aligned>(grad_out + warp * dim, gradients.out + (from + warp) * dim, 1, dim,
                                dot);
    if (lane == 0) {
      along[warp] = dot[0];
      rows.shrink[warp] = 1;
    }
  }
  for (int64_t p = part.range.begin; p < part.range.end; p += kAttendWarps) {
    const bool there = is_token(segments, part, p + warp);
    A score[heads] = {}, gradient[heads] = {};
    if (there) {
      const T* x = row_start(segments, p + warp);
      dot_products<T, heads, aligned>(x, args.queries + first_head * dim, count, dim, score);
      dot_products<T, heads, aligned>(x, grad_out, count, dim, gradient);
    }
    __syncthreads();  // `along` is there, and the rows before are added
    if (lane == 0) {
      rows.row[warp] = there ? p + warp : -1;
      for (int h = 0; h < heads; ++h) {
        rows.factor[warp][h] = 0;
        if (!there || h >= count) continue;
        const A share = exp(args.scale * score[h] - gradients.lse[from + h]);
        const A slope = args.scale * share * (gradient[h] - along[h]);
        const int64_t at = (p + warp) * args.heads + first_head + h;
        gradients.share[at] = share;
        gradients.slope[at] = slope;
        rows.factor[warp][h] = slope;
      }
    }
    __syncthreads();
    const int64_t to = blockIdx.x * args.heads + first_head;
    add_rows<T, heads, aligned>(segments, rows, count, p == part.range.begin,
                                gradients.sums + to * dim);
  }
}

// Grid (batch, heads).
template <class T>
__global__ void __launch_bounds__(kAttendThreads)
    add_parts(AttentionArgs<T> args, AttentionGradients<T> gradients) {
  using A = Accumulator<T>;
  const int64_t dim = args.rows.segments.dim;
  const PartsOf own = parts_of(args, blockIdx.x, blockIdx.y);
  const A* sums = gradients.sums + own.first * dim;
  const int64_t to = int64_t(blockIdx.x) * args.heads + blockIdx.y;
  for (int64_t c = threadIdx.x; c < dim; c += kAttendThreads) {
    A sum = 0;
    for (int64_t k = 0; k < own.number; ++k) sum += sums[k * args.heads * dim + c];
    gradients.grad_queries[to * dim + c] = sum;
  }
}

// Grid (slots). A warp owns a row.
template <class T, bool aligned>
__global__ void __launch_bounds__(kAttendThreads)
    row_gradients(AttentionArgs<T> args, AttentionGradients<T> gradients) {
  using A = Accumulator<T>;
  constexpr int columns = kColumns<T, aligned>;
  const Segments<T>& segments = args.rows.segments;
  const int64_t dim = segments.dim;
  const Chunk part = chunk_of_slot(args.rows, blockIdx.x, PoolMode::mean);
  const A* grad_out = gradients.grad_out + part.segment * args.heads * dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t p = part.range.begin + warp; p < part.range.end; p += kAttendWarps) {
    const int64_t heads = is_token(segments, part, p) ? args.heads : 0;
    const A *share = gradients.share + p * args.heads, *slope = gradients.slope + p * args.heads;
    for (int64_t c = lane * columns; c < dim; c += 32 * columns) {
      A sum[columns] = {};
      for (int64_t h = 0; h < heads; ++h) {
        A gradient[columns], query[columns];
        load_values(grad_out + h * dim + c, gradient);
        load_values(args.queries + h * dim + c, query);
        for (int i = 0; i < columns; ++i) sum[i] += share[h] * gradient[i] + slope[h] * query[i];
      }
      store_values(gradients.grad_x + p * dim + c, sum);
    }
  }
}

}  // namespace emblas::cuda
