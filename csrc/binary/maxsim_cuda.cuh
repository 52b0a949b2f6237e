// Late interaction on a GPU: queries and documents are sets of tokens, and
//   scores[b, n] = sum over tokens i of query b of max over tokens j of document n of <q_i, d_j>
//
// Forward. A block owns a query and a document. It multiplies tiles of 32 and 64 tokens, 16 bytes
// of dimensions at a time from shared memory, 4 x 4 products to a thread, and keeps the largest
// product of each query token in registers: products never reach memory. Rows in shared memory are
// an odd number of 16-byte pieces apart, so reads of neighbouring rows fall into different banks.
// Bits stand for +1 and -1. Against float queries they are spread to floats on their way to shared
// memory; two codes are compared by counting bits, <q, d> = dim - 2 |q ^ d|.
//
// Bytes: tokens once if the queries of a document run at the same time; bound by multiplying in
// float (128 per clock and multiprocessor; 8 loads of 16 bytes from shared memory per 64 products).
//
// Backward, without atomics. Each pair of tokens that won carries its document's gradient. The
// gradient of a query token is a sum over documents, that of a document token a sum over the query
// tokens that chose it, both in order: a warp looks at 32 of them at a time and adds the rows of
// those that won. Bytes: gradients once, rows as often as they won, mostly from the L2 cache.
#pragma once

#include <type_traits>

#include "binary/codes_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kPairThreads = 128;
inline constexpr int kQueryTokens = 32, kDocumentTokens = 64;  // of a tile
inline constexpr int kTilePieces = 8;                          // of each token at a time
inline constexpr int kRowLanes = 16;                           // that share query tokens
inline constexpr int kOwnQueries = kQueryTokens * kRowLanes / kPairThreads;  // of a thread
inline constexpr int kOwnDocuments = kDocumentTokens / kRowLanes;

// Values in 16 bytes.
template <class T>
inline constexpr int kPieceValues = std::is_same_v<T, Bits> ? 128 : simt::kVector<T>;

// Tokens [begin, end) of a set, inside the batch whatever the offsets hold.
struct TokenSet {
  int64_t begin, end;
};
__device__ inline TokenSet token_set(const TokenRows& tokens, int64_t set) {
  const auto clamped = [&](int64_t offset) { return min(max(offset, int64_t(0)), tokens.count); };
  const int64_t begin = clamped(tokens.offsets[set]), end = clamped(tokens.offsets[set + 1]);
  return {begin, max(begin, end)};
}
// The set of a token; there must be one.
__device__ inline int64_t set_of(const TokenRows& tokens, int64_t token) {
  int64_t low = 0, high = tokens.sets - 1;  // the last set that begins at or before it
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (tokens.offsets[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Four bits of a byte, the highest first, as +1 and -1.
__device__ inline uint4 signs_of(unsigned bits) {
  const simt::Vector<float> signs{{bits & 8 ? 1.0f : -1.0f, bits & 4 ? 1.0f : -1.0f,
                                   bits & 2 ? 1.0f : -1.0f, bits & 1 ? 1.0f : -1.0f}};
  uint4 raw;
  memcpy(&raw, &signs, 16);
  return raw;
}

// Brings `pieces` pieces of each token of a tile, from `piece` on, to shared memory as values of
// type P; there is nothing but zeros beyond the last token and the last dimension.
template <class T, class P, bool aligned, int rows>
__device__ inline void load_tokens(const TokenRows& tokens, int64_t first, int64_t end, int piece,
                                   int pieces, uint4 (&tile)[rows][kTilePieces + 1]) {
  constexpr bool spread = std::is_same_v<T, Bits> && !std::is_same_v<P, Bits>;
  // Pieces that one load makes: of 16 bytes, or of a byte of signs.
  constexpr int made = spread ? 2 : kPieceValues<T> / kPieceValues<P>;
  constexpr int unit = aligned ? 16 : sizeof(T) >= 4 ? 4 : 1;
  const int loads = (pieces + made - 1) / made;
  for (int at = threadIdx.x; at < rows * loads; at += kPairThreads) {
    const int row = at / loads, load = at % loads, byte = (piece / made + load) * (spread ? 1 : 16);
    const int valid = first + row < end ? tokens.bytes - byte : 0;
    const uint8_t* from = tokens.data + (first + row) * tokens.stride + byte;
    uint4* const to = &tile[row][load * made];
    if constexpr (spread) {
      const unsigned bits = valid > 0 ? *from : 0;
      simt::store_16_bytes(to, signs_of(bits >> 4));
      simt::store_16_bytes(to + 1, signs_of(bits));
    } else if constexpr (made == 1) {
      simt::store_16_bytes(to, load_piece<unit>(from, valid));
    } else {
      const uint4 raw = load_piece<unit>(from, valid);
      simt::Vector<T> values;
      memcpy(&values, &raw, 16);
      for (int i = 0; i < made; ++i) {
        simt::Vector<P> wide;
        for (int j = 0; j < kPieceValues<P>; ++j) {
          wide.at[j] = simt::to_accumulator(values.at[i * kPieceValues<P> + j]);
        }
        simt::store_vector(reinterpret_cast<P*>(to + i), wide);
      }
    }
  }
}

// sum += <q, d> of a piece, or the number of bits that differ.
template <class P, class Sum>
__device__ inline void add_products(const uint4& q, const uint4& d, Sum& sum) {
  if constexpr (std::is_same_v<P, Bits>) {
    sum += differing_bits(q, d);
  } else {
    simt::Vector<P> left, right;
    memcpy(&left, &q, 16);
    memcpy(&right, &d, 16);
    for (int i = 0; i < kPieceValues<P>; ++i) sum += left.at[i] * right.at[i];
  }
}

// Grid (queries * documents); blocks that run at the same time share a document. Q and D are what
// tokens are made of. `aligned`: all tokens start at multiples of 16 bytes and are such long.
template <class Q, class D, bool aligned>
__global__ void __launch_bounds__(kPairThreads, 4) score_pairs(MaxSimArgs<Score<Q>> args) {
  using A = Score<Q>;
  constexpr bool bits = std::is_same_v<Q, Bits>;
  SIMT_SHARED(uint4, wanted, [kQueryTokens][kTilePieces + 1]);
  SIMT_SHARED(uint4, given, [kDocumentTokens][kTilePieces + 1]);
  SIMT_SHARED(A, largest, [kQueryTokens]);
  constexpr int row_step = kPairThreads / kRowLanes;
  const int row = threadIdx.x / kRowLanes, column = threadIdx.x % kRowLanes;
  const int64_t b = blockIdx.x % args.queries.sets, n = blockIdx.x / args.queries.sets;
  const TokenSet query = token_set(args.queries, b), document = token_set(args.documents, n);
  const int pieces = int((args.dim + kPieceValues<Q> - 1) / kPieceValues<Q>);
  A total = 0;
  for (int64_t i = query.begin; i < query.end; i += kQueryTokens) {
    A best[kOwnQueries];
    int32_t where[kOwnQueries];
    for (int r = 0; r < kOwnQueries; ++r) {
      best[r] = document.begin < document.end ? -A(INFINITY) : A(0);
      where[r] = -1;
    }
    for (int64_t j = document.begin; j < document.end; j += kDocumentTokens) {
      std::conditional_t<bits, int, A> sum[kOwnQueries][kOwnDocuments] = {};
      for (int piece = 0; piece < pieces; piece += kTilePieces) {
        const int left = min(pieces - piece, kTilePieces);
        load_tokens<Q, Q, aligned>(args.queries, i, query.end, piece, left, wanted);
        load_tokens<D, Q, aligned>(args.documents, j, document.end, piece, left, given);
        __syncthreads();
#pragma unroll 1  // registers
        for (int p = 0; p < left; ++p) {
          uint4 q[kOwnQueries], d[kOwnDocuments];
          for (int r = 0; r < kOwnQueries; ++r) {
            q[r] = simt::load_16_bytes(&wanted[row + r * row_step][p]);
          }
          for (int c = 0; c < kOwnDocuments; ++c) {
            d[c] = simt::load_16_bytes(&given[column + c * kRowLanes][p]);
          }
          for (int r = 0; r < kOwnQueries; ++r) {
            for (int c = 0; c < kOwnDocuments; ++c) add_products<Q>(q[r], d[c], sum[r][c]);
          }
        }
        __syncthreads();
      }
      for (int c = 0; c < kOwnDocuments; ++c) {
        const int64_t token = j + column + c * kRowLanes;
        if (token >= document.end) continue;
        for (int r = 0; r < kOwnQueries; ++r) {
          const A product = bits ? A(args.dim - 2 * int64_t(sum[r][c])) : A(sum[r][c]);
          if (product > best[r]) {
            best[r] = product;
            where[r] = int32_t(token);
          }
        }
      }
    }
    for (int r = 0; r < kOwnQueries; ++r) {
      for (int flip = kRowLanes / 2; flip > 0; flip /= 2) {
        const A other = __shfl_xor_sync(simt::kAllLanes, best[r], flip);
        const int32_t there = __shfl_xor_sync(simt::kAllLanes, where[r], flip);
        if (other > best[r] || (other == best[r] && there < where[r])) {
          best[r] = other;
          where[r] = there;
        }
      }
      const int64_t token = i + row + r * row_step;
      if (column > 0) continue;
      largest[row + r * row_step] = token < query.end ? best[r] : A(0);
      if (args.argmax && token < query.end) {
        args.argmax[token * args.documents.sets + n] = where[r];
      }
    }
    __syncthreads();
    if (threadIdx.x < kQueryTokens) total += simt::warp_sum(largest[threadIdx.x]);
    __syncthreads();
  }
  if (threadIdx.x == 0) args.scores[b * args.documents.sets + n] = total;
}

// The gradient of queries or of documents. Grid (tokens, tiles of 32 vectors of columns), 8 warps
// for a query token, which take turns, one for a document token. `aligned`: dim and addresses allow
// 16 bytes at a time.
template <class A, bool of_queries, bool aligned>
__global__ void __launch_bounds__(of_queries ? 256 : 32) sum_winners(MaxSimBackwardArgs<A> args) {
  constexpr int warps = of_queries ? 8 : 1;
  constexpr int vector = simt::kVector<A>, tile = 32 * vector;
  SIMT_SHARED(A, of_warp, [warps][tile]);
  const TokenRows& own = of_queries ? args.queries : args.documents;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = blockIdx.x, set = set_of(own, token);
  const int64_t first_column = int64_t(blockIdx.y) * tile;
  const int64_t columns = min(args.dim - first_column, int64_t(tile));
  // The lane's i-th column in the tile is first + i * step.
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const A* rows = (of_queries ? args.document_values : args.query_values) + first_column;
  const int64_t candidates = of_queries ? args.documents.sets : args.queries.count;
  A sum[vector] = {};
  for (int64_t c = warp * 32; c < candidates; c += warps * 32) {
    const int64_t candidate = c + lane, n = of_queries ? candidate : set;
    const int64_t query_token = of_queries ? token : candidate;
    int64_t winner = -1;  // the row to add
    A weight = 0;
    if (candidate < candidates) {
      const int64_t chosen = args.argmax[query_token * args.documents.sets + n];
      if (of_queries && chosen < args.documents.count) winner = chosen;
      if (!of_queries && chosen == token) winner = candidate;
    }
    if (winner >= 0) {
      const int64_t b = of_queries ? set : set_of(args.queries, candidate);
      weight = args.grad[b * args.documents.sets + n];
    }
    for (unsigned won = __ballot_sync(simt::kAllLanes, winner >= 0); won; won &= won - 1) {
      const int source = __ffs(won) - 1;
      const A factor = __shfl_sync(simt::kAllLanes, weight, source);
      const A* row = rows + __shfl_sync(simt::kAllLanes, winner, source) * args.dim;
      if (aligned && first + vector <= columns) {
        const simt::Vector<A> x = simt::load_vector(row + first);
        for (int i = 0; i < vector; ++i) sum[i] += factor * x.at[i];
      } else {
        for (int i = 0; i < vector; ++i) {
          if (first + i * step < columns) sum[i] += factor * row[first + i * step];
        }
      }
    }
  }
  for (int i = 0; i < vector; ++i) of_warp[warp][first + i * step] = sum[i];
  __syncthreads();
  A* out = (of_queries ? args.grad_queries : args.grad_documents) + token * args.dim + first_column;
  for (int64_t c = threadIdx.x; c < columns; c += 32 * warps) {
    A total = 0;
    for (int w = 0; w < warps; ++w) total += of_warp[w][c];
    out[c] = total;
  }
}

}  // namespace emblas::cuda
