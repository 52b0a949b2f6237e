// Vocabulary pooling on a GPU: what vocab_pool_cuda.cu launches on a stream (a
// cudaStream_t), never waiting. The formulas stand in vocab_pool.h.
#pragma once

#include "pooling/pooling_cuda.h"

namespace emblas::cuda {

// Of a tile of logits, which torch's matrix product fills: in the second-level cache, and large
// enough that two launches for each are little.
inline constexpr int64_t kLogitTokens = 4096;
inline constexpr int64_t kLogitWords = 2048;

template <class T>
struct LogitTile {
  const T* logits;  // [tokens, words]: tokens [first_token, last_token) of the batch
  int64_t words;
  int64_t first_token, last_token;
  int64_t first_word;
};

// Folds a tile into the running maxima of its words; tiles come in the order of their tokens.
// out, argmax: [batch, vocab]; bias: [vocab] or null.
template <class T>
void fold_logits(const SegmentRows<T>& rows, int64_t batch, const LogitTile<T>& tile,
                 const Accumulator<T>* bias, int64_t vocab, Accumulator<T>* out, int32_t* argmax,
                 void* stream);

template <class T>
struct VocabGradients {
  using A = Accumulator<T>;
  const A* grad_out;      // [batch, vocab]
  const int32_t* argmax;  // [batch, vocab]
  int64_t batch, vocab, tokens, dim;
};

// The token that each (sequence, word) sends a gradient to; `tokens` where to none.
template <class T>
void find_winners(const VocabGradients<T>& args, int32_t* winner, void* stream);
// sorted: the winners in rising order; order: where each one was; bounds: a workspace
// [tokens + 1]; grad_x: [tokens, dim].
template <class T>
void vocab_token_gradients(const VocabGradients<T>& args, const T* weight, const int32_t* sorted,
                           const int64_t* order, int64_t* bounds, T* grad_x, void* stream);
// grad_weight: [vocab, dim].
template <class T>
void vocab_word_gradients(const VocabGradients<T>& args, const T* x, T* grad_weight, void* stream);

}  // namespace emblas::cuda
