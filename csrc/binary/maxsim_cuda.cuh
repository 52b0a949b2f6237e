// Late interaction on a GPU: queries and documents are sets of tokens, and
//   scores[b, n] = sum over tokens i of query b of max over tokens j of document n of <q_i, d_j>
//
// Forward. A block owns a query and a document. It multiplies tiles of 32 and 64 tokens, 128 bytes
// of each at a time from shared memory, and keeps the largest product of each query token in
// registers: products never reach memory. Rows in shared memory are an odd number of 16-byte pieces
// apart, so reads of neighbouring rows fall into different banks. Bits stand for +1 and -1:
// <q, d> = dim - 2 (number of bits that differ).
//
// Values of 16 bits, and bits against bits, are multiplied by tensor cores (sm_80). A warp takes 8
// query tokens as columns and all 64 document tokens as rows. Bits agree where both are set or
// neither is: |q & d| + |~q & ~d|, two products and no other count. Without tensor cores a thread
// multiplies 4 x 4 tokens, 16 bytes at a time, or counts |~(q ^ d)|; values of 16 bits, and bits
// against float queries, become accumulators on their way to shared memory.
//
// Bytes: tokens once if the queries of a document run at the same time. Tensor cores wait for them:
// a value from the L2 cache is multiplied 32 times. The others are bound by multiplying in float
// (128 per clock and multiprocessor; 8 loads of 16 bytes from shared memory per 64 products).
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

// Products of a tile, or numbers of bits that agree, in the registers of a thread.
template <class Sum>
using Sums = Sum[4][4];

// The products of a tile that are a thread's own: of the query tokens query(r) and the document
// tokens document(c). Lanes that differ in the bits first_flip to last_flip share query tokens.
template <bool tensor_cores>
struct OwnProducts {
  static constexpr int queries = tensor_cores ? 2 : 4, documents = 16 / queries;
  static constexpr int first_flip = tensor_cores ? 4 : 1, last_flip = tensor_cores ? 16 : 8;

  __device__ static int query(int r) {
    if (tensor_cores) return threadIdx.x / 32 * 8 + threadIdx.x % 4 * 2 + r;
    return threadIdx.x / 16 + r * 8;
  }
  __device__ static int document(int c) {
    if (tensor_cores) return threadIdx.x % 32 / 4 + c * 8;
    return threadIdx.x % 16 + c * 16;
  }
  template <class Sum>
  __device__ static Sum& product(Sums<Sum>& sum, int r, int c) {
    return tensor_cores ? sum[c / 2][c % 2 * 2 + r] : sum[r][c];
  }
};

using WantedTile = uint4[kQueryTokens][kTilePieces + 1];
using GivenTile = uint4[kDocumentTokens][kTilePieces + 1];

// Adds the own products of two pieces, or the numbers of bits that agree.
template <class P, class Sum>
__device__ inline void add_by_mma(const WantedTile& wanted, const GivenTile& given, int piece,
                                  Sums<Sum>& sum) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t q[2];
  for (int i = 0; i < 2; ++i) {
    const uint4* const row = &wanted[8 * warp + lane / 4][piece + i];
    q[i] = reinterpret_cast<const uint32_t*>(row)[lane % 4];
  }
  for (int m = 0; m < 4; ++m) {
    uint32_t d[4];
    simt::ldmatrix_x4(d, &given[16 * m + lane % 16][piece + lane / 16]);
    if constexpr (std::is_same_v<P, Bits>) {
      const uint32_t clear_q[2] = {~q[0], ~q[1]}, clear_d[4] = {~d[0], ~d[1], ~d[2], ~d[3]};
      simt::mma_m16n8k256_and_popc(sum[m], d, q);
      simt::mma_m16n8k256_and_popc(sum[m], clear_d, clear_q);
    } else {
      simt::mma_m16n8k16(P{}, sum[m], d, q);
    }
  }
#endif
}

// sum += <q, d> of a piece, or the number of bits that agree.
template <class P, class Sum>
__device__ inline void add_product(const uint4& q, const uint4& d, Sum& sum) {
  if constexpr (std::is_same_v<P, Bits>) {
    sum += kPieceValues<Bits> - differing_bits(q, d);
  } else {
    simt::Vector<P> left, right;
    memcpy(&left, &q, 16);
    memcpy(&right, &d, 16);
    for (int i = 0; i < kPieceValues<P>; ++i) sum += left.at[i] * right.at[i];
  }
}

// The same of one piece, in the thread itself.
template <class P, class Sum>
__device__ inline void add_by_thread(const WantedTile& wanted, const GivenTile& given, int piece,
                                     Sums<Sum>& sum) {
  using Own = OwnProducts<false>;
  uint4 q[Own::queries], d[Own::documents];
  for (int r = 0; r < Own::queries; ++r) q[r] = simt::load_16_bytes(&wanted[Own::query(r)][piece]);
  for (int c = 0; c < Own::documents; ++c) {
    d[c] = simt::load_16_bytes(&given[Own::document(c)][piece]);
  }
  for (int r = 0; r < Own::queries; ++r) {
    for (int c = 0; c < Own::documents; ++c) add_product<P>(q[r], d[c], sum[r][c]);
  }
}

// Grid (queries * documents); blocks that run at the same time share a document. Q and D are what
// tokens are made of. `aligned`: all tokens start at multiples of 16 bytes and are such long.
template <class Q, class D, bool aligned, bool tensor_cores>
__global__ void __launch_bounds__(kPairThreads, 4) score_pairs(MaxSimArgs<Score<Q>> args) {
  using A = Score<Q>;
  constexpr bool bits = std::is_same_v<Q, Bits>;
  using P = std::conditional_t<tensor_cores || bits, Q, A>;  // of shared memory
  using Own = OwnProducts<tensor_cores>;
  constexpr int together = tensor_cores ? 2 : 1;  // pieces that are multiplied
  constexpr int values = together * kPieceValues<P>;
  SIMT_SHARED(uint4, wanted, [kQueryTokens][kTilePieces + 1]);
  SIMT_SHARED(uint4, given, [kDocumentTokens][kTilePieces + 1]);
  SIMT_SHARED(A, largest, [kQueryTokens]);
  const int64_t b = blockIdx.x % args.queries.sets, n = blockIdx.x / args.queries.sets;
  const TokenSet query = token_set(args.queries, b), document = token_set(args.documents, n);
  const int pieces = int((args.dim + values - 1) / values) * together;
  A total = 0;
  for (int64_t i = query.begin; i < query.end; i += kQueryTokens) {
    A best[Own::queries];
    int32_t where[Own::queries];
    for (int r = 0; r < Own::queries; ++r) {
      best[r] = document.begin < document.end ? -A(INFINITY) : A(0);
      where[r] = -1;
    }
    for (int64_t j = document.begin; j < document.end; j += kDocumentTokens) {
      Sums<std::conditional_t<bits, int, A>> sum = {};
      for (int piece = 0; piece < pieces; piece += kTilePieces) {
        const int left = min(pieces - piece, kTilePieces);
        load_tokens<Q, P, aligned>(args.queries, i, query.end, piece, left, wanted);
        load_tokens<D, P, aligned>(args.documents, j, document.end, piece, left, given);
        __syncthreads();
#pragma unroll 1  // registers
        for (int p = 0; p < left; p += together) {
          if constexpr (tensor_cores) {
            add_by_mma<P>(wanted, given, p, sum);
          } else {
            add_by_thread<P>(wanted, given, p, sum);
          }
        }
        __syncthreads();
      }
      for (int c = 0; c < Own::documents; ++c) {
        const int64_t token = j + Own::document(c);
        if (token >= document.end) continue;
        for (int r = 0; r < Own::queries; ++r) {
          const auto own = Own::product(sum, r, c);
          const A product =
              bits ? A(args.dim - 2 * (pieces * kPieceValues<P> - int64_t(own))) : A(own);
          if (product > best[r]) {
            best[r] = product;
            where[r] = int32_t(token);
          }
        }
      }
    }
    for (int r = 0; r < Own::queries; ++r) {
      for (int flip = Own::first_flip; flip <= Own::last_flip; flip *= 2) {
        const A other = __shfl_xor_sync(simt::kAllLanes, best[r], flip);
        const int32_t there = __shfl_xor_sync(simt::kAllLanes, where[r], flip);
        if (other > best[r] || (other == best[r] && there < where[r])) {
          best[r] = other;
          where[r] = there;
        }
      }
      const int64_t token = i + Own::query(r);
      if (Own::document(0) > 0) continue;
      largest[Own::query(r)] = token < query.end ? best[r] : A(0);
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
