// Vocabulary pooling: the largest logit of each word over the tokens of a sequence (SPLADE, arXiv
// 2107.05720 and 2109.10086; DupMAE), without ever holding the logits of all tokens.
//
//   out_bv = max_t x_t . W_v + bias_v    over the tokens t of sequence b, and the t that gives it
// relu and log1p grow with their argument, so they may follow the maximum. The bias may too.
//
// torch's matrix product fills one tile (kTileTokens, kTileWords) of a reused buffer at a time; the
// kernel here folds it into (batch, vocabulary) maxima.
//
// Backward: only the (b, v) whose gradient g is not zero take part, t = argmax_bv:
//   dx_t += g W_v       dW_v += g x_t       dbias_v = sum_b g
// which is batch V dim work instead of tokens V dim.
//
// Bytes: the tile is in the second-level cache; the matrix product is the limit, forward.
#pragma once

#include "pooling/segments.h"

namespace emblas {

inline constexpr int64_t kTileTokens = 1024;
inline constexpr int64_t kTileWords = 1024;

template <class T>
struct VocabTile {
  const T* logits;  // [tokens, row_stride]: tokens [first_token, last_token) of the batch
  int64_t row_stride;
  int64_t first_token, last_token;
  Segments<T> segments;  // weights say which tokens are there
  int64_t batch;
  Accumulator<T>* out;  // [batch, vocab], at the tile's first word; starts as -infinity
  int32_t* argmax;      // [batch, vocab], starts as -1
  int64_t vocab;
};

template <class T>
struct VocabPool {
  using A = Accumulator<T>;
  // Columns [first, last) of the tile; scratch holds as many accumulators.
  void (*fold)(const VocabTile<T>&, int64_t first, int64_t last, A* scratch);
  // total[i] += factor * row[i]
  void (*add)(A* total, const T* row, A factor, int64_t dim);
  void (*narrow)(T* out, const A* x, A factor, int64_t dim);
};
using VocabPoolKernels = ByDtype<VocabPool>;

}  // namespace emblas
