// Lexical weights on a GPU: of each sequence its distinct ids in rising order, each with the token
// of its largest weight.
//
// A thread owns a token and compares it with every other one of its sequence: is there a better one
// of the same id, and how many ids are smaller? Neighbours read the same addresses, so that is
// tokens x length comparisons from the first-level cache; nothing to sort, and no workspace but two
// numbers for each token. Arithmetic is the limit of long sequences, the launches of short ones.
#pragma once

#include "common/cuda/simt.h"
#include "pooling/lexical_cuda.h"

namespace emblas::cuda {

inline constexpr int kLexicalThreads = 128;

struct Sequence {
  int64_t begin, end;
};
// The sequence that holds a token; inside [0, tokens) whatever the offsets are.
__device__ inline Sequence sequence_of(const LexicalArgs& args, int64_t token) {
  int64_t low = 0, high = args.batch - 1;  // the last sequence that starts at or before the token
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (args.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = min(max(int64_t(args.cu_seqlens[low]), int64_t(0)), args.tokens);
  const int64_t end = min(max(int64_t(args.cu_seqlens[low + 1]), begin), args.tokens);
  return {begin, end};
}

// Blocks of tokens.
__global__ void __launch_bounds__(kLexicalThreads) choose_best(LexicalArgs args, int64_t* chosen) {
  const int64_t token = int64_t(blockIdx.x) * kLexicalThreads + threadIdx.x;
  if (token >= args.tokens) return;
  const int64_t id = args.ids[token];
  const float weight = args.weights[token];
  bool best = weight > 0;
  for (int i = 0; i < args.ignored_count; ++i) best &= id != args.ignored[i];
  if (best) {
    const Sequence sequence = sequence_of(args, token);
    // A token that no sequence holds has no place among the chosen.
    best = token >= sequence.begin && token < sequence.end;
    for (int64_t t = sequence.begin; t < sequence.end; ++t) {
      const float other = args.weights[t];
      const bool better = other > weight || (other == weight && t < token);
      if (args.ids[t] == id && better) best = false;
    }
  }
  chosen[token] = best;
}

// Blocks of tokens, and of sequences.
__global__ void __launch_bounds__(kLexicalThreads)
    place_chosen(LexicalArgs args, const int64_t* chosen, const int64_t* up_to, int64_t* crow,
                 int64_t* columns, int64_t* at) {
  const int64_t i = int64_t(blockIdx.x) * kLexicalThreads + threadIdx.x;
  const auto before = [&](int64_t token) { return token > 0 ? up_to[token - 1] : int64_t(0); };
  if (i <= args.batch) {
    crow[i] = before(min(max(int64_t(args.cu_seqlens[i]), int64_t(0)), args.tokens));
  }
  if (i >= args.tokens) return;
  if (i >= before(args.tokens)) columns[i] = at[i] = -1;
  if (!chosen[i]) return;
  const Sequence sequence = sequence_of(args, i);
  int64_t place = before(sequence.begin);
  for (int64_t t = sequence.begin; t < sequence.end; ++t) {
    place += chosen[t] && args.ids[t] < args.ids[i];
  }
  columns[place] = args.ids[i];
  at[place] = i;
}

}  // namespace emblas::cuda
