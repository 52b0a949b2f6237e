// Gradients of packed attention on a GPU, by tensor cores: vectors of 16 bits, sums in float. The
// formulas stand in attention.h.
//
// Weights are made again, tile by tile, from the log-sum-exp of forward (Dao et al., 2022, arXiv
// 2205.14135, algorithm 4), by two kernels. In the first a block owns 64 queries of one head and
// walks through the keys that they see, for the gradient of the queries; it also leaves D, one
// number for each query. In the second a block owns 64 keys of one key head and walks through the
// queries that see them, head after head of its group, for the gradients of keys and values. So
// every sum has one owner and one order, which depends on the sequence alone: nothing is atomic.
//
// A warp owns 16 rows. What it multiplies with every tile, weights, slopes (ds_ij) and sums stay in
// registers; the tiles come by cp.async into two stages, as in forward. Where the registers of one
// warp don't suffice for all of it, warps come in pairs that own the same rows: one holds what
// makes the weights, the other what makes the slopes, and what the one has made for the other goes
// through shared memory. Of queries' gradients either sums half of the columns; of keys' and
// values' the one sums the values', the other the keys'.
//
// Bytes: q, k, v, out and its gradient about once, and what is walked through once for every 64
// rows, mostly from the L2 cache; nothing of size (queries, keys). Bound by tensor cores: 14 d
// flops for each pair of query and key, 4 d more than one pass that adds to all three gradients,
// beside two exponentials.
#pragma once

#include "attention/attention_tiles_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kTeamThreads = 2 * kTileRows;  // a warp for 16 rows
// 2 where warps come in pairs: the first team has the warps that make weights, the second the
// others.
template <int dim>
inline constexpr int kTeamsOfQueries = dim <= 128 ? 1 : 2;
template <int dim>
inline constexpr int kTeamsOfKeys = dim <= 64 ? 1 : 2;

template <int teams>
__device__ inline int team_of_thread() {
  return teams == 1 ? 0 : threadIdx.x / kTeamThreads;
}

// Up to 64 vectors, the first of which is at `from`.
template <class T>
struct Rows {
  const T* from;
  int64_t stride;
  int width;
};
template <class T>
__device__ inline Rows<T> rows_from(const HeadVectors<const T>& x, int64_t token, int64_t head,
                                    int64_t width) {
  return {x.at(token, head), x.token_stride, int(width)};
}

// Makes two tiles of rows left factors: the first for what makes weights, the second for what makes
// slopes. Returns where in the memory, of 64 rows at least, the second one still lies.
template <class T, int dim, int teams>
__device__ inline const uint4* take_both(const Rows<T>& first, const Rows<T>& second, int count,
                                         bool aligned, uint4* memory,
                                         uint32_t (&rows)[3 - teams][dim / 16][4]) {
  constexpr bool room_for_both = dim <= 128;
  constexpr int threads = teams * kTeamThreads, slopes = 2 - teams;
  const int team = team_of_thread<teams>(), first_row = threadIdx.x % kTeamThreads / 32 * 16;
  uint4* const second_place = memory + (room_for_both ? kTileRows * dim / 8 : 0);
  const auto load = [&](const Rows<T>& from, uint4* to) {
    load_rows<T, dim, kTileRows, threads>(from.from, from.stride, count, from.width, aligned, to);
  };
  const auto arrive = [&] {
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    __syncthreads();
  };
  load(first, memory);
  if constexpr (room_for_both) load(second, second_place);
  arrive();
  if (team == 0) take_rows<dim>(memory, first_row, rows[0]);
  if constexpr (!room_for_both) {
    __syncthreads();
    load(second, second_place);
    arrive();
  }
  if (team == teams - 1) take_rows<dim>(second_place, first_row, rows[slopes]);
  return second_place;
}

// One query and one key.
struct Pair {
  int position, key;
  float logarithm;  // of the query's sum of exponentials, of base 2
  float delta;      // D of the query
};

// Of the warp's rows and those of two tiles, by pair_at(n, i): weights p_ij, and slopes ds_ij. Of
// two teams the first makes weights, and slopes that lack the factor which the second makes.
template <class T, int dim, int teams, int tiles, class PairAt>
__device__ inline void weigh(const uint32_t (&rows)[3 - teams][dim / 16][4],
                             const uint4* weight_tile, const uint4* slope_tile, const Shape& shape,
                             const Window& window, bool masked, const PairAt& pair_at,
                             float (&weights)[tiles][4], float (&slopes)[tiles][4]) {
  constexpr int of_slopes = 2 - teams;
  const int team = team_of_thread<teams>();
  const auto for_pairs = [&](auto change) {
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) change(weights[n][i], slopes[n][i], pair_at(n, i));
    }
  };
  if (team == teams - 1) {
    multiply_rows<T, dim>(rows[of_slopes], slope_tile, slopes);
    for_pairs([](float&, float& slope, const Pair& pair) { slope -= pair.delta; });
  } else {
    for_pairs([](float&, float& slope, const Pair&) { slope = 1; });
  }
  if (team != 0) return;
  multiply_rows<T, dim>(rows[0], weight_tile, weights);
  for_pairs([&](float& score, float&, const Pair&) { score *= shape.factor; });
  if (shape.cap != 0) {
    for_pairs([&](float& score, float& slope, const Pair&) {
      const float share = tanhf(score);
      slope *= 1 - share * share;
      score = shape.cap * share;
    });
  }
  if (shape.slope != 0) {
    for_pairs([&](float& score, float&, const Pair& pair) {
      score -= shape.slope * float(abs(pair.key - pair.position));
    });
  }
  for_pairs([](float& score, float&, const Pair& pair) { score = exp2f(score - pair.logarithm); });
  if (masked) {
    for_pairs([&](float& weight, float&, const Pair& pair) {
      if (pair.key < window.first_seen(pair.position)) weight = 0;
      if (pair.key > window.last_seen(pair.position)) weight = 0;
    });
  }
  for_pairs([](float& weight, float& slope, const Pair&) { slope *= weight; });
}

// What the warps of a pair hand over, and take: 16 bytes for each lane at a time.
template <int tiles>
__device__ inline void hand_over(const float (&slopes)[tiles][4], float* to) {
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
    const simt::Vector<float> own{{slopes[n][0], slopes[n][1], slopes[n][2], slopes[n][3]}};
    simt::store_vector(to + n * 128 + threadIdx.x % 32 * 4, own);
  }
}
template <int tiles>
__device__ inline void multiply_by(const float* from, float (&slopes)[tiles][4]) {
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
    const auto other = simt::load_vector(from + n * 128 + threadIdx.x % 32 * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) slopes[n][i] *= other.at[i];
  }
}

// D of the queries of a tile, whose gradients lie in shared memory; for this block, and for others.
template <class T, int dim, int threads>
__device__ inline void sum_products(const VarlenAttentionBackwardArgs<T>& args, const OwnTile& own,
                                    int64_t head, bool aligned, const uint4* grad_tile,
                                    float* tile_deltas, float* deltas) {
  constexpr int pieces = dim / 8;
  const int piece = threadIdx.x % pieces;
  const int of_row = min(max(int(args.forward.value_dim) - 8 * piece, 0), 8);
  for (int row = threadIdx.x / pieces; row < kTileRows; row += threads / pieces) {
    float sum = 0;
    if (row < own.count) {
      const uint4* const place = grad_tile + place_of_piece<dim>(row, piece);
      const simt::Vector<T> grads = simt::load_vector(reinterpret_cast<const T*>(place));
      const T* const from = args.forward.out.at(own.begin() + row, head) + 8 * piece;
      simt::Vector<T> values{};
      if (aligned && of_row == 8) {
        values = simt::load_vector(from);
      } else {
        for (int i = 0; i < 8; ++i) {
          if (i < of_row) values.at[i] = from[i];
        }
      }
      for (int i = 0; i < 8; ++i) {
        sum += simt::to_accumulator(grads.at[i]) * simt::to_accumulator(values.at[i]);
      }
    }
    for (int flip = 1; flip < pieces; flip *= 2) sum += __shfl_xor_sync(simt::kAllLanes, sum, flip);
    if (piece != 0) continue;
    if (row < own.count) {
      const int64_t at = head * args.forward.lse_stride + own.begin() + row;
      if (args.grad_lse) sum -= args.grad_lse[at];
      deltas[at] = sum;
    }
    tile_deltas[row] = sum;
  }
}

// Grid (slots of queries * heads).
template <class T, int dim>
__global__ void __launch_bounds__(kTeamThreads* kTeamsOfQueries<dim>, 3 - kTeamsOfQueries<dim>)
    grad_queries_tile(VarlenAttentionBackwardArgs<T> args, float* deltas, PackedSizes sizes,
                      bool aligned) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int teams = kTeamsOfQueries<dim>, threads = teams * kTeamThreads;
  constexpr int tile_keys = kStepRows<dim>, tile_pieces = tile_keys * dim / 8;
  constexpr int columns = dim / teams;  // of the gradient, for a warp
  SIMT_SHARED(uint4, memory, [4 * tile_pieces]);
  SIMT_SHARED(float, tile_deltas, [kTileRows]);
  static_assert(4 * tile_pieces >= kTileRows * dim / 8);
  const VarlenAttentionArgs<T>& forward = args.forward;
  const int team = team_of_thread<teams>(), lane = threadIdx.x % 32;
  const int first_row = threadIdx.x % kTeamThreads / 32 * 16, row = first_row + lane / 4;
  const int64_t head = blockIdx.x % forward.heads, slot = blockIdx.x / forward.heads;
  const OwnTile own = tile_of_slot(forward.cu_seqlens_q, sizes.batch, sizes.queries, slot);
  if (own.count == 0) return;
  const SequenceTokens keys = tokens_of(forward.cu_seqlens_k, own.sequence, sizes.keys);
  const Window window{int(forward.window_left), int(forward.window_right), keys.count};

  uint32_t rows[3 - teams][dim / 16][4];
  const uint4* const grad_tile =
      take_both<T, dim, teams>(rows_from(forward.q, own.begin(), head, forward.head_dim),
                               rows_from(args.grad_out, own.begin(), head, forward.value_dim),
                               own.count, aligned, memory, rows);
  sum_products<T, dim, threads>(args, own, head, aligned, grad_tile, tile_deltas, deltas);
  __syncthreads();

  // In a tile that isn't full the last query stands in for others.
  const int ahead = keys.count - own.tokens.count;
  const auto position_of = [&](int query) { return own.first + min(query, own.count - 1) + ahead; };
  const int position[2] = {position_of(row), position_of(row + 8)};
  float logarithm[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = min(row + 8 * r, own.count - 1);
    logarithm[r] = forward.lse[head * forward.lse_stride + own.begin() + query] * kLog2E;
    delta[r] = tile_deltas[row + 8 * r];
  }

  const int64_t key_head = head / forward.heads_per_group;
  const auto load = [&](int start, int stage) {
    uint4* const to = memory + stage * 2 * tile_pieces;
    const int64_t token = keys.begin + start;
    const int left = keys.count - start;
    load_rows<T, dim, tile_keys, threads>(forward.k.at(token, key_head), forward.k.token_stride,
                                          left, int(forward.head_dim), aligned, to);
    load_rows<T, dim, tile_keys, threads>(forward.v.at(token, key_head), forward.v.token_stride,
                                          left, int(forward.value_dim), aligned, to + tile_pieces);
    simt::cp_async_commit();
  };
  const int begin = window.first_seen(position_of(0));
  const int end = window.last_seen(position_of(kTileRows)) + 1;
  const Shape shape = shape_of(forward, own.sequence, head);
  float total[columns / 8][4] = {};
  int stage = 0;
  if (begin < end) load(begin, stage);
  for (int start = begin; start < end; start += tile_keys) {
    simt::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before isn't needed any more
    const uint4* const k_tile = memory + stage * 2 * tile_pieces;
    const uint4* const v_tile = k_tile + tile_pieces;
    stage ^= 1;
    if (start + tile_keys < end) load(start + tile_keys, stage);

    const bool masked = start < window.first_seen(position[1]) ||
                        start + tile_keys - 1 > window.last_seen(position[0]);
    const auto pair_at = [&](int n, int i) {
      const int key = start + 8 * n + lane % 4 * 2 + i % 2;
      return Pair{position[i / 2], key, logarithm[i / 2], delta[i / 2]};
    };
    float weights[tile_keys / 8][4] = {};
    float slopes[tile_keys / 8][4] = {};
    weigh<T, dim, teams>(rows, k_tile, v_tile, shape, window, masked, pair_at, weights, slopes);
    if constexpr (teams == 2) {
      SIMT_SHARED(float, passed, [2 * kTileRows * tile_keys]);
      float* const of_rows = passed + first_row * tile_keys;
      hand_over(slopes, of_rows + team * kTileRows * tile_keys);
      __syncthreads();
      multiply_by(of_rows + (1 - team) * kTileRows * tile_keys, slopes);
    }
    add_rows<T, dim>(slopes, k_tile, team * columns / 8, total);
  }

  __syncthreads();  // the last tile isn't needed any more
  put_rows<T, dim>(total, {forward.scale, forward.scale}, first_row, team * columns / 8, memory);
  __syncthreads();
  store_rows<T, dim, threads>(memory, args.grad_q.at(own.begin(), head), args.grad_q.token_stride,
                              own.count, int(forward.head_dim));
#endif
}

// Grid (slots of keys * key heads).
template <class T, int dim>
__global__ void __launch_bounds__(kTeamThreads* kTeamsOfKeys<dim>, 3 - kTeamsOfKeys<dim>)
    grad_keys_tile(VarlenAttentionBackwardArgs<T> args, const float* deltas, PackedSizes sizes,
                   int64_t key_heads, bool aligned) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int teams = kTeamsOfKeys<dim>, threads = teams * kTeamThreads, last = 2 - teams;
  constexpr int tile_queries = kStepRows<dim> < 32 ? kStepRows<dim> : 32;  // more would spill
  constexpr int tile_pieces = tile_queries * dim / 8;
  SIMT_SHARED(uint4, memory, [4 * tile_pieces]);
  SIMT_SHARED(float, logarithms, [2][tile_queries]);
  SIMT_SHARED(float, tile_deltas, [2][tile_queries]);
  static_assert(4 * tile_pieces >= kTileRows * dim / 8);
  const VarlenAttentionArgs<T>& forward = args.forward;
  const int thread = threadIdx.x, team = team_of_thread<teams>(), lane = thread % 32;
  const int first_row = thread % kTeamThreads / 32 * 16, row = first_row + lane / 4;
  const int64_t key_head = blockIdx.x % key_heads, slot = blockIdx.x / key_heads;
  const OwnTile own = tile_of_slot(forward.cu_seqlens_k, sizes.batch, sizes.keys, slot);
  if (own.count == 0) return;
  const SequenceTokens queries = tokens_of(forward.cu_seqlens_q, own.sequence, sizes.queries);
  const Window window{int(forward.window_left), int(forward.window_right), own.tokens.count};

  uint32_t rows[3 - teams][dim / 16][4];
  take_both<T, dim, teams>(rows_from(forward.k, own.begin(), key_head, forward.head_dim),
                           rows_from(forward.v, own.begin(), key_head, forward.value_dim),
                           own.count, aligned, memory, rows);
  __syncthreads();

  float logarithm, delta;  // of the thread's query in the tile that comes next
  const auto load = [&](int64_t head, int start, int stage) {
    uint4* const to = memory + stage * 2 * tile_pieces;
    const int64_t token = queries.begin + start;
    const int left = queries.count - start;
    load_rows<T, dim, tile_queries, threads>(forward.q.at(token, head), forward.q.token_stride,
                                             left, int(forward.head_dim), aligned, to);
    load_rows<T, dim, tile_queries, threads>(args.grad_out.at(token, head),
                                             args.grad_out.token_stride, left,
                                             int(forward.value_dim), aligned, to + tile_pieces);
    simt::cp_async_commit();
    const bool there = thread < min(tile_queries, left);
    const int64_t at = head * forward.lse_stride + token + thread;
    logarithm = there ? forward.lse[at] * kLog2E : INFINITY;  // of what isn't there weights are 0
    delta = there ? deltas[at] : 0.0f;
  };
  // The queries that see any of the keys, in every head.
  const int ahead = own.tokens.count - queries.count;
  const int begin = max(own.first - ahead - window.right, 0);
  const int end = min(own.first + own.count - 1 - ahead + window.left, queries.count - 1) + 1;
  int64_t head = key_head * forward.heads_per_group;
  const int64_t end_of_heads = begin < end ? head + forward.heads_per_group : head;
  float totals[3 - teams][dim / 8][4] = {};
  int start = begin, stage = 0;
  if (head < end_of_heads) load(head, start, stage);
  while (head < end_of_heads) {
    if (thread < tile_queries) {
      logarithms[stage][thread] = logarithm;
      tile_deltas[stage][thread] = delta;
    }
    simt::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before isn't needed any more
    const uint4* const q_tile = memory + stage * 2 * tile_pieces;
    const uint4* const grad_tile = q_tile + tile_pieces;
    const int first_position = start + ahead, last_position = first_position + tile_queries - 1;
    const Shape shape = shape_of(forward, own.sequence, head);
    const float* const tile_logarithms = logarithms[stage];
    const float* const of_tile = tile_deltas[stage];
    stage ^= 1;
    start += tile_queries;
    if (start >= end) {
      start = begin;
      ++head;
    }
    if (head < end_of_heads) load(head, start, stage);

    const int key = own.first + row;
    const bool masked =
        key < last_position - window.left || key + 8 > first_position + window.right;
    const auto pair_at = [&](int n, int i) {
      const int query = 8 * n + lane % 4 * 2 + i % 2;
      return Pair{first_position + query, key + i / 2 * 8, tile_logarithms[query], of_tile[query]};
    };
    float weights[tile_queries / 8][4] = {};
    float slopes[tile_queries / 8][4] = {};
    weigh<T, dim, teams>(rows, q_tile, grad_tile, shape, window, masked, pair_at, weights, slopes);
    if constexpr (teams == 2) {
      SIMT_SHARED(float, passed, [kTileRows * tile_queries]);
      float* const of_rows = passed + first_row * tile_queries;
      if (team == 0) hand_over(slopes, of_rows);
      __syncthreads();
      if (team == 1) multiply_by(of_rows, slopes);
    }
    if (team == 0) add_rows<T, dim>(weights, grad_tile, 0, totals[0]);
    if (team == teams - 1) add_rows<T, dim>(slopes, q_tile, 0, totals[last]);
  }

  __syncthreads();  // the last tile isn't needed any more
  if (team == 0) put_rows<T, dim>(totals[0], {1.0f, 1.0f}, first_row, 0, memory);
  __syncthreads();
  store_rows<T, dim, threads>(memory, args.grad_v.at(own.begin(), key_head),
                              args.grad_v.token_stride, own.count, int(forward.value_dim));
  __syncthreads();
  if (team == teams - 1) {
    put_rows<T, dim>(totals[last], {forward.scale, forward.scale}, first_row, 0, memory);
  }
  __syncthreads();
  store_rows<T, dim, threads>(memory, args.grad_k.at(own.begin(), key_head),
                              args.grad_k.token_stride, own.count, int(forward.head_dim));
#endif
}

}  // namespace emblas::cuda
