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
// the same 32 KiB, after them the results.
//
// Tiles depend on the length of their own sequence only, so the bits do too.
//
// Bytes: q and the result once, k and v once for every 64 queries, mostly from the L2 cache. Bound
// by tensor cores: 4 d flops for each pair of query and key, beside one exponential.
#pragma once

#include "attention/attention_tiles_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kAttentionThreads = 2 * kTileRows;  // a warp for 16 queries

// The four lanes that share a row get the same.
__device__ inline float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(simt::kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(simt::kAllLanes, x, 2));
}
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(simt::kAllLanes, x, 1);
  return x + __shfl_xor_sync(simt::kAllLanes, x, 2);
}

// Grid (slots * heads): heads that share keys run at the same time.
template <class T, int dim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attend_tile(VarlenAttentionArgs<T> args, PackedSizes sizes, bool aligned) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int tile_keys = kStepRows<dim>;
  constexpr int tile_pieces = tile_keys * dim / 8;  // of keys, and of values
  constexpr float ln_2 = 0.6931471805599453f;
  SIMT_SHARED(uint4, memory, [4 * tile_pieces]);
  static_assert(4 * tile_pieces >= kTileRows * dim / 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t head = blockIdx.x % args.heads, slot = blockIdx.x / args.heads;
  const OwnTile own = tile_of_slot(args.cu_seqlens_q, sizes.batch, sizes.queries, slot);
  if (own.count == 0) return;
  const SequenceTokens keys = tokens_of(args.cu_seqlens_k, own.sequence, sizes.keys);
  const Window window{int(args.window_left), int(args.window_right), keys.count};

  // In a tile that isn't full the last query stands in for others.
  const int ahead = keys.count - own.tokens.count;
  const auto position_of = [&](int query) { return own.first + min(query, own.count - 1) + ahead; };
  const int row = warp * 16 + lane / 4;
  const int position[2] = {position_of(row), position_of(row + 8)};

  uint32_t query[dim / 16][4];
  load_rows<T, dim, kTileRows, kAttentionThreads>(args.q.at(own.begin(), head), args.q.token_stride,
                                                  own.count, int(args.head_dim), aligned, memory);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  __syncthreads();
  take_rows<dim>(memory, warp * 16, query);
  __syncthreads();

  const int64_t key_head = head / args.heads_per_group;
  const auto load = [&](int start, int stage) {
    uint4* const to = memory + stage * 2 * tile_pieces;
    const int64_t token = keys.begin + start;
    const int left = keys.count - start;
    load_rows<T, dim, tile_keys, kAttentionThreads>(args.k.at(token, key_head), args.k.token_stride,
                                                    left, int(args.head_dim), aligned, to);
    load_rows<T, dim, tile_keys, kAttentionThreads>(args.v.at(token, key_head), args.v.token_stride,
                                                    left, int(args.value_dim), aligned,
                                                    to + tile_pieces);
    simt::cp_async_commit();
  };
  const int begin = window.first_seen(position_of(0)) / tile_keys * tile_keys;
  const int end = window.last_seen(position_of(kTileRows)) + 1;
  const Shape shape = shape_of(args, own.sequence, head);
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
    multiply_rows<T, dim>(query, k_tile, scores);
    const auto for_scores = [&](auto change) {
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          change(scores[n][i], start + 8 * n + lane % 4 * 2 + i % 2, position[i / 2]);
        }
      }
    };
    for_scores([&](float& score, int, int) { score *= shape.factor; });
    if (shape.cap != 0) {
      for_scores([&](float& score, int, int) { score = shape.cap * tanhf(score); });
    }
    if (shape.slope != 0) {
      for_scores(
          [&](float& score, int key, int at) { score -= shape.slope * float(abs(key - at)); });
    }
    if (start < window.first_seen(position[1]) ||
        start + tile_keys - 1 > window.last_seen(position[0])) {
      for_scores([&](float& score, int key, int at) {
        if (key < window.first_seen(at) || key > window.last_seen(at)) score = -INFINITY;
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

    add_rows<T, dim>(scores, v_tile, 0, weighted);
  }

  __syncthreads();  // the last tile isn't needed any more
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_row(total[r]);
    inverse[r] = sum == 0 ? 0.0f : 1 / sum;
    const int query_row = row + 8 * r;
    if (args.lse && lane % 4 == 0 && query_row < own.count) {
      args.lse[head * args.lse_stride + own.begin() + query_row] =
          sum == 0 ? -INFINITY : (maximum[r] + log2f(sum)) * ln_2;
    }
  }
  put_rows<T, dim>(weighted, inverse, warp * 16, 0, memory);
  __syncthreads();
  store_rows<T, dim, kAttentionThreads>(memory, args.out.at(own.begin(), head),
                                        args.out.token_stride, own.count, int(args.value_dim));
#endif
}

}  // namespace emblas::cuda
