// Vocabulary pooling on a GPU; the formulas stand in vocab_pool.h.
//
// Forward. torch's matrix product fills a tile of logits, `fold_tile` takes its maxima: a block
// owns a segment and 32 vectors of words, its warps take turns at the segment's rows of the tile,
// and what they find is compared with what earlier tiles gave. Bytes: the tile, which the
// second-level cache holds; the product is the limit.
//
// Backward. Of each (sequence, word) one token is the winner. `word_gradients` adds for a word the
// tokens that won it, a warp for each word. For the tokens the pairs are sorted (stably, by torch)
// by the winner; `token_gradients` adds for a token the words that it won, its warps taking turns.
// Nothing is added in an order that depends on another sequence, and nothing atomically. Bytes: a
// row for each pair whose gradient is not 0, most of them from the second-level cache.
#pragma once

#include "pooling/segment_max_cuda.cuh"
#include "pooling/vocab_pool_cuda.h"

namespace emblas::cuda {

inline constexpr int kVocabWarps = 8;
inline constexpr int kVocabThreads = 32 * kVocabWarps;

// Grid (batch, blocks of words). `aligned`: rows of logits start at multiples of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kVocabThreads, 3)
    fold_tile(SegmentRows<T> rows, LogitTile<T> tile, const Accumulator<T>* bias, int64_t vocab,
              Accumulator<T>* out, int32_t* argmax) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>, width = 32 * vector;
  SIMT_SHARED(Largest<A>, of_warp, [kVocabWarps][width]);
  const Segments<T>& segments = rows.segments;
  const Positions all = positions_of(rows, blockIdx.x);
  const int64_t begin = max(all.begin, tile.first_token), end = min(all.end, tile.last_token);
  if (begin >= end && tile.first_token > 0) return;  // the whole block
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_column = int64_t(blockIdx.y) * width;
  const int64_t columns = min(tile.words - first_column, int64_t(width));
  // The lane's i-th column in the block is first + i * step.
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const bool whole = aligned && first + vector <= columns;
  Largest<A> largest[vector];
  for (Largest<A>& none : largest) none = {0, -1};
#pragma unroll 2  // more than that spills registers on sm_120
  for (int64_t p = begin + warp; p < end; p += kVocabWarps) {
    if (segments.weights && segments.weights[p] == 0) continue;
    const T* row = tile.logits + (p - tile.first_token) * tile.words + first_column;
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
  for (int c = threadIdx.x; c < columns; c += kVocabThreads) {
    const int64_t word = tile.first_word + first_column + c, to = blockIdx.x * vocab + word;
    Largest<A> found{0, -1};
    if (tile.first_token > 0) found = {out[to], argmax[to]};
    for (int w = 0; w < kVocabWarps; ++w) found.merge(of_warp[w][c]);
    const bool complete = all.end <= tile.last_token;  // no later tile has rows of this segment
    if (bias && complete && found.position >= 0) found.value += bias[word];
    out[to] = found.value;
    argmax[to] = found.position;
  }
}

// Blocks of pairs (sequence, word).
template <class T>
__global__ void __launch_bounds__(kVocabThreads)
    name_winners(VocabGradients<T> args, int32_t* winner) {
  const int64_t pair = int64_t(blockIdx.x) * kVocabThreads + threadIdx.x;
  if (pair >= args.batch * args.vocab) return;
  const int64_t token = args.argmax[pair];
  const bool wins = args.grad_out[pair] != 0 && token >= 0 && token < args.tokens;
  winner[pair] = int32_t(wins ? token : args.tokens);
}

// bounds[t]: the first pair that token t or a later one won. Blocks of tokens, one more than there
// are.
__device__ inline int64_t first_from(const int32_t* sorted, int64_t count, int64_t token) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}
template <class T>
__global__ void __launch_bounds__(kVocabThreads)
    token_bounds(VocabGradients<T> args, const int32_t* sorted, int64_t* bounds) {
  const int64_t token = int64_t(blockIdx.x) * kVocabThreads + threadIdx.x;
  if (token <= args.tokens) bounds[token] = first_from(sorted, args.batch * args.vocab, token);
}

// Grid (tokens, blocks of columns). `aligned`: rows start at multiples of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kVocabThreads)
    token_gradients_of_words(VocabGradients<T> args, const T* weight, const int64_t* order,
                             const int64_t* bounds, T* grad_x) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>, width = 32 * vector;
  SIMT_SHARED(A, of_warp, [kVocabWarps][width]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_column = int64_t(blockIdx.y) * width;
  const int64_t columns = min(args.dim - first_column, int64_t(width));
  const int first = aligned ? lane * vector : lane, step = aligned ? 1 : 32;
  const bool whole = aligned && first + vector <= columns;
  A sum[vector] = {};
#pragma unroll 2
  for (int64_t i = bounds[blockIdx.x] + warp; i < bounds[blockIdx.x + 1]; i += kVocabWarps) {
    const int64_t pair = order[i];
    const A gradient = args.grad_out[pair];
    const T* row = weight + pair % args.vocab * args.dim + first_column;
    if (whole) {
      const simt::Vector<T> values = simt::load_vector(row + first);
      for (int j = 0; j < vector; ++j) sum[j] += gradient * simt::to_accumulator(values.at[j]);
    } else {
      for (int j = 0; j < vector; ++j) {
        const int c = first + j * step;
        if (c < columns) sum[j] += gradient * simt::to_accumulator(row[c]);
      }
    }
  }
  for (int i = 0; i < vector; ++i) of_warp[warp][first + i * step] = sum[i];
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kVocabThreads) {
    A total = 0;
    for (int w = 0; w < kVocabWarps; ++w) total += of_warp[w][c];
    simt::from_accumulator(total, grad_x + blockIdx.x * args.dim + first_column + c);
  }
}

// Blocks of words, a warp for each: neighbours share the sectors of grad_out and argmax. `aligned`:
// rows start at multiples of 16 bytes and consist of whole vectors.
template <class T, bool aligned>
__global__ void __launch_bounds__(kVocabThreads)
    word_gradients(VocabGradients<T> args, const T* x, T* grad_weight) {
  using A = Accumulator<T>;
  constexpr int vector = aligned ? simt::kVector<T> : 1;
  const int64_t word = int64_t(blockIdx.x) * kVocabWarps + threadIdx.x / 32;
  if (word >= args.vocab) return;
  for (int64_t c = threadIdx.x % 32 * vector; c < args.dim; c += 32 * vector) {
    A sum[vector] = {}, row[vector];
    for (int64_t b = 0; b < args.batch; ++b) {
      const int64_t pair = b * args.vocab + word, token = args.argmax[pair];
      const A gradient = args.grad_out[pair];
      if (gradient == 0 || token < 0 || token >= args.tokens) continue;
      load_values(x + token * args.dim + c, row);
      for (int i = 0; i < vector; ++i) sum[i] += gradient * row[i];
    }
    store_values(grad_weight + word * args.dim + c, sum);
  }
}

}  // namespace emblas::cuda
