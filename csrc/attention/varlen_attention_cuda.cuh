// Packed attention on a GPU, by tensor cores: q, k and v of 16 bits, sums in float.
//
// A block owns 64 queries of one sequence and head, a warp 16 of them. The block walks through the
// keys that any of its queries sees, a tile at a time, with the online softmax of FlashAttention-2
// (Dao, 2023, arXiv 2307.08691, algorithm 1): queries, scores, weights and the weighted values stay
// in registers, where the scores' layout as a result of mma is that of a factor of the next one.
// Tiles of keys and values come by cp.async, the next ones while the tensor cores are at work.
// Exponentials are of base 2, which is what the hardware has.
//
// A tile of keys and values takes 16 KiB of shared memory (64, 32 or 16 keys for vectors of up to
// 64, 128 or 256 values), and two of them are there at a time. Before them the queries pass through
// the same 32 KiB, after them the results. Rows are cut into pieces of 16 bytes, which are permuted
// so that the 8 rows that ldmatrix reads at a time lie in different banks.
//
// Tiles depend on the length of their own sequence only, so the bits do too.
//
// Bytes: q and the result once, k and v once for every 64 queries, mostly from the L2 cache. Bound
// by tensor cores: 4 d flops for each pair of query and key, beside one exponential.
#pragma once

#include "attention/varlen_attention_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr int kAttentionThreads = 2 * kTileQueries;  // a warp for 16 queries

// Tokens [begin, begin + count) of a sequence, inside the batch whatever the offsets hold.
struct SequenceTokens {
  int64_t begin;
  int count;
};
__device__ inline SequenceTokens tokens_of(const int32_t* cu_seqlens, int64_t b, int64_t tokens) {
  const int64_t begin = min(max(int64_t(cu_seqlens[b]), int64_t(0)), tokens);
  const int64_t end = min(max(int64_t(cu_seqlens[b + 1]), begin), tokens);
  return {begin, int(end - begin)};
}

__device__ inline int64_t slot_of_sequence(const int32_t* cu_seqlens, int64_t b, int64_t tokens) {
  return tokens_of(cu_seqlens, b, tokens).begin / kTileQueries + b;
}
// The last sequence that starts at or before a slot.
__device__ inline int64_t sequence_of_slot(const int32_t* cu_seqlens, const PackedSizes& sizes,
                                           int64_t slot) {
  int64_t low = 0, high = sizes.batch - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (slot_of_sequence(cu_seqlens, middle, sizes.queries) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Where a piece of a row of `dim` values is, in pieces. Eight rows of one piece differ in their
// place in a line of 128 bytes, which all 32 banks make.
template <int dim>
__device__ inline int place_of_piece(int row, int piece) {
  constexpr int pieces = dim / 8, rows_of_line = dim < 64 ? 64 / dim : 1;
  constexpr int places = dim < 64 ? pieces : 8;
  return row * pieces + (piece ^ (row / rows_of_line % places));
}

// Rows of a tile to shared memory, behind the computation if they are aligned; zeros beyond `count`
// rows and `width` values.
template <class T, int dim, int rows>
__device__ inline void load_rows(const T* from, int64_t stride, int count, int width, bool aligned,
                                 uint4* to) {
  constexpr int pieces = dim / 8;
  const int piece = threadIdx.x % pieces, first_row = threadIdx.x / pieces;
  constexpr int step = kAttentionThreads / pieces;
  const int of_row = min(max(width - 8 * piece, 0), 8);  // values
  from += 8 * piece;
  if (aligned) {
#pragma unroll(dim < 256 ? 8 : 2)  // registers
    for (int row = first_row; row < rows; row += step) {
      simt::cp_async_16(to + place_of_piece<dim>(row, piece), from + row * stride,
                        row < count ? of_row * int(sizeof(T)) : 0);
    }
    return;
  }
#pragma unroll 1  // registers
  for (int row = first_row; row < rows; row += step) {
    T* const target = reinterpret_cast<T*>(to + place_of_piece<dim>(row, piece));
    for (int i = 0; i < 8; ++i) {
      target[i] = row < count && i < of_row ? from[row * stride + i] : T{};
    }
  }
}

// The way back.
template <class T, int dim>
__device__ inline void store_rows(const uint4* from, T* to, int64_t stride, int count, int width) {
  constexpr int pieces = dim / 8;
  const int piece = threadIdx.x % pieces, first = 8 * piece;
  for (int row = threadIdx.x / pieces; row < count; row += kAttentionThreads / pieces) {
    const uint4* const source = from + place_of_piece<dim>(row, piece);
    const simt::Vector<T> values = simt::load_vector(reinterpret_cast<const T*>(source));
    T* const target = to + row * stride + first;
    if (width % 8 == 0) {
      if (first < width) simt::store_vector(target, values);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (first + i < width) target[i] = values.at[i];
      }
    }
  }
}

// Two values in a register, as mma takes them.
template <class T>
__device__ inline uint32_t pair_of(float first, float second) {
  T values[2];
  simt::from_accumulator(first, &values[0]);
  simt::from_accumulator(second, &values[1]);
  uint32_t pair;
  memcpy(&pair, values, sizeof(pair));
  return pair;
}

// Multiplies with two tiles of 8 columns, as ldmatrix_x4 brings them.
template <class T>
__device__ inline void multiply(const uint32_t (&a)[4], const uint32_t (&b)[4], float (&left)[4],
                                float (&right)[4]) {
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  simt::mma_m16n8k16(T{}, left, a, b_left);
  simt::mma_m16n8k16(T{}, right, a, b_right);
}

// The four lanes that share a row get the same.
__device__ inline float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(simt::kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(simt::kAllLanes, x, 2));
}
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(simt::kAllLanes, x, 1);
  return x + __shfl_xor_sync(simt::kAllLanes, x, 2);
}

// Grid (slots * heads): heads that share keys run at the same time. A lane holds of each product
// rows lane / 4 and lane / 4 + 8 of its warp, columns 2 (lane % 4) and the next of every 8.
template <class T, int dim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attend_tile(VarlenAttentionArgs<T> args, PackedSizes sizes, bool aligned) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int tile_keys = dim <= 64 ? 64 : 4096 / dim;
  constexpr int tile_pieces = tile_keys * dim / 8;  // of keys, and of values
  constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;
  SIMT_SHARED(uint4, memory, [4 * tile_pieces]);
  static_assert(4 * tile_pieces >= kTileQueries * dim / 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t head = blockIdx.x % args.heads, slot = blockIdx.x / args.heads;
  const int64_t b = sequence_of_slot(args.cu_seqlens_q, sizes, slot);
  const int64_t skipped = slot - slot_of_sequence(args.cu_seqlens_q, b, sizes.queries);
  const SequenceTokens queries = tokens_of(args.cu_seqlens_q, b, sizes.queries);
  const SequenceTokens keys = tokens_of(args.cu_seqlens_k, b, sizes.keys);
  const int64_t first_query = skipped * kTileQueries;
  if (first_query < 0 || first_query >= queries.count) return;
  const int first = int(first_query), tile_queries = min(queries.count - first, kTileQueries);

  // The keys that a query sees; in a tile that isn't full the last query stands in for others.
  const int ahead = keys.count - queries.count;
  const auto position_of = [&](int query) { return first + min(query, tile_queries - 1) + ahead; };
  const auto first_seen = [&](int position) { return max(position - int(args.window_left), 0); };
  const auto last_seen = [&](int position) {
    return min(position + int(args.window_right), keys.count - 1);
  };
  const int row = warp * 16 + lane / 4;
  const int position[2] = {position_of(row), position_of(row + 8)};

  uint32_t query[dim / 16][4];
  load_rows<T, dim, kTileQueries>(args.q.at(queries.begin + first, head), args.q.token_stride,
                                  tile_queries, int(args.head_dim), aligned, memory);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int step = 0; step < dim / 16; ++step) {
    const int place = place_of_piece<dim>(warp * 16 + lane % 16, 2 * step + lane / 16);
    simt::ldmatrix_x4(query[step], memory + place);
  }
  __syncthreads();

  const int64_t key_head = head / args.heads_per_group;
  const auto load = [&](int start, int stage) {
    uint4* const to = memory + stage * 2 * tile_pieces;
    const int64_t token = keys.begin + start;
    const int left = keys.count - start;
    load_rows<T, dim, tile_keys>(args.k.at(token, key_head), args.k.token_stride, left,
                                 int(args.head_dim), aligned, to);
    load_rows<T, dim, tile_keys>(args.v.at(token, key_head), args.v.token_stride, left,
                                 int(args.value_dim), aligned, to + tile_pieces);
    simt::cp_async_commit();
  };
  const int begin = first_seen(position_of(0)) / tile_keys * tile_keys;
  const int end = last_seen(position_of(kTileQueries)) + 1;
  const ScoreArgs<float>& options = args.scores;
  const bool capped = options.softcap != 0;
  const float factor = capped ? args.scale / options.softcap : args.scale * log2_e;
  const float slope =
      options.alibi_slopes ? options.alibi_slopes[b * options.alibi_stride + head] * log2_e : 0;
  float weighted[dim / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  int stage = 0;
  if (begin < end) load(begin, stage);
  for (int start = begin; start < end; start += tile_keys) {
    simt::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before isn't needed any more
    const uint4* const k_tile = memory + stage * 2 * tile_pieces;
    const uint4* const v_tile = k_tile + tile_pieces;
    stage ^= 1;
    if (start + tile_keys < end) load(start + tile_keys, stage);

    float scores[tile_keys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < dim / 16; ++step) {
#pragma unroll
      for (int j = 0; j < tile_keys; j += 16) {
        uint32_t k[4];
        const int key = j + lane % 8 + lane / 16 * 8, piece = 2 * step + lane / 8 % 2;
        simt::ldmatrix_x4(k, k_tile + place_of_piece<dim>(key, piece));
        multiply<T>(query[step], k, scores[j / 8], scores[j / 8 + 1]);
      }
    }

    const auto for_scores = [&](auto change) {
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          change(scores[n][i], start + 8 * n + lane % 4 * 2 + i % 2, position[i / 2]);
        }
      }
    };
    for_scores([&](float& score, int, int) { score *= factor; });
    if (capped) {
      const float cap = options.softcap * log2_e;
      for_scores([&](float& score, int, int) { score = cap * tanhf(score); });
    }
    if (slope != 0) {
      for_scores([&](float& score, int key, int at) { score -= slope * float(abs(key - at)); });
    }
    if (start < first_seen(position[1]) || start + tile_keys - 1 > last_seen(position[0])) {
      for_scores([&](float& score, int key, int at) {
        if (key < first_seen(at) || key > last_seen(at)) score = -INFINITY;
      });
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
        highest = fmaxf(highest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      }
      highest = largest_of_row(highest);
      // Where nothing was seen yet, -inf - -inf would be NaN.
      const float base = highest == -INFINITY ? 0.0f : highest;
      const float shrink = exp2f(maximum[r] - base);
      maximum[r] = highest;
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          scores[n][i] = exp2f(scores[n][i] - base);
          total[r] += scores[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < dim / 8; ++n) {
        weighted[n][2 * r] *= shrink;
        weighted[n][2 * r + 1] *= shrink;
      }
    }

#pragma unroll
    for (int j = 0; j < tile_keys; j += 16) {
      const float (&low)[4] = scores[j / 8], (&high)[4] = scores[j / 8 + 1];
      const uint32_t weights[4] = {pair_of<T>(low[0], low[1]), pair_of<T>(low[2], low[3]),
                                   pair_of<T>(high[0], high[1]), pair_of<T>(high[2], high[3])};
#pragma unroll
      for (int step = 0; step < dim / 16; ++step) {
        uint32_t v[4];
        const int place = place_of_piece<dim>(j + lane % 16, 2 * step + lane / 16);
        simt::ldmatrix_x4_transposed(v, v_tile + place);
        multiply<T>(weights, v, weighted[2 * step], weighted[2 * step + 1]);
      }
    }
  }

  __syncthreads();  // the last tile isn't needed any more
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_row(total[r]), inverse = sum == 0 ? 0.0f : 1 / sum;
    const int own = row + 8 * r;
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) {
      uint32_t* const words = reinterpret_cast<uint32_t*>(memory + place_of_piece<dim>(own, n));
      words[lane % 4] = pair_of<T>(weighted[n][2 * r] * inverse, weighted[n][2 * r + 1] * inverse);
    }
    if (args.lse && lane % 4 == 0 && own < tile_queries) {
      args.lse[head * args.lse_stride + queries.begin + first + own] =
          sum == 0 ? -INFINITY : (maximum[r] + log2f(sum)) * ln_2;
    }
  }
  __syncthreads();
  store_rows<T, dim>(memory, args.out.at(queries.begin + first, head), args.out.token_stride,
                     tile_queries, int(args.value_dim));
#endif
}

}  // namespace emblas::cuda
