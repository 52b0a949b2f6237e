// Summed vocabulary pooling on a GPU: what vocab_sum_cuda.cu launches on a stream (a cudaStream_t),
// never waiting. The formulas stand in python/emblas/pooling/op_vocab_sum.py.
#pragma once

#include "pooling/vocab_pool_cuda.h"

namespace emblas::cuda {

// As their numbers are in the schema: f(x) = x, relu(x), log(1 + relu(x)) and
// log(1 + log(1 + relu(x))).
inline constexpr int64_t kActivations = 4;

// What turns the products of a tile into values.
template <class T>
struct Activated {
  const Accumulator<T>* bias;  // [vocab] or null
  int64_t activation;
};

// --- forward ---------------------------------------------------------------------------------

// Sums of the chunks that begin in [tile.first_token, tile.last_token), the first of which is a
// multiple of kChunkRows. The tile goes on for kChunkRows - 1 rows where there are so many.
// partial: [chunk_slots, tile.words].
template <class T>
void sum_tile(const SegmentRows<T>& rows, const LogitTile<T>& tile, const Activated<T>& activated,
              Accumulator<T>* partial, void* stream);
// The sums of segments, words [first_word, first_word + words) of out [batch, vocab].
template <class T>
void add_chunks(const SegmentRows<T>& rows, const Accumulator<T>* partial, int64_t first_word,
                int64_t words, int64_t vocab, Accumulator<T>* out, void* stream);

// --- backward --------------------------------------------------------------------------------

// owner: [positions] the segment of each token, or -1 where none.
template <class T>
void find_owners(const SegmentRows<T>& rows, int32_t* owner, void* stream);
// to: [tokens, dim] x, with zeros for the tokens of no segment.
template <class T>
void keep_tokens(const T* x, const int32_t* owner, int64_t tokens, int64_t dim, T* to,
                 void* stream);

// Replaces the logits of a tile by their gradients.
template <class T>
struct TileGradients {
  using A = Accumulator<T>;
  LogitTile<T> tile;
  T* logits;  // of the tile
  Activated<T> activated;
  const int32_t* owner;
  const A* grad_out;  // [batch, vocab]
  int64_t vocab;
  A* partial;  // sums of kChunkRows rows [chunks of all tokens, tile.words], or null
};
template <class T>
void tile_gradients(const TileGradients<T>& args, void* stream);
// grad_bias: [words], the sums of `chunks` rows of `partial`.
template <class T>
void add_bias_gradients(const Accumulator<T>* partial, int64_t chunks, int64_t words,
                        Accumulator<T>* grad_bias, void* stream);

// A gradient of `size` elements is the sum of products, which come one after the other.
template <class T>
struct ProductSum {
  const T* product;
  int64_t size;
  bool first, last;
  Accumulator<T>* sum;  // of the products so far
  T* out;               // written with the last one
};
template <class T>
void add_product(const ProductSum<T>& args, void* stream);

}  // namespace emblas::cuda
