// Lexical weights on a GPU: what lexical_cuda.cu launches on a stream (a cudaStream_t), never
// waiting.
#pragma once

#include <cstdint>

namespace emblas::cuda {

inline constexpr int kMaxIgnored = 32;  // they travel as an argument of the kernels

struct LexicalArgs {
  const int64_t* ids;         // [tokens]
  const float* weights;       // [tokens]
  const int32_t* cu_seqlens;  // [batch + 1]
  int64_t batch, tokens;
  int64_t ignored[kMaxIgnored];
  int32_t ignored_count;
};

// chosen: [tokens], 1 where a token has the first largest weight of its id in its sequence and the
// weight is above 0, else 0.
void choose_words(const LexicalArgs& args, int64_t* chosen, void* stream);
// up_to: [tokens], the sums of `chosen` up to each token. crow: [batch + 1]; columns, at: [tokens].
void place_words(const LexicalArgs& args, const int64_t* chosen, const int64_t* up_to,
                 int64_t* crow, int64_t* columns, int64_t* at, void* stream);

}  // namespace emblas::cuda
