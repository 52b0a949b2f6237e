// Packed attention on a GPU: what varlen_attention_cuda.cu launches, on a stream (a cudaStream_t),
// never waiting.
#pragma once

#include "attention/attention.h"

namespace emblas::cuda {

struct PackedSizes {
  int64_t batch, queries, keys;  // sequences; tokens of q and of k
};
inline constexpr int64_t kMostAttentionTokens = int64_t(1) << 30;  // of q or k, less than
inline constexpr int kTileQueries = 64;

// Sequences are cut into tiles of queries for blocks to take. Which tile has a block? Sequence b
// starts at slot begin_b / kTileQueries + b. It needs ceil(length / kTileQueries) slots at most and
// the next one starts no earlier, so slots are unique, and the host knows their number without
// reading offsets. A block finds its sequence by binary search; a few slots stay idle.
inline int64_t attention_slots(const PackedSizes& sizes) {
  return sizes.queries / kTileQueries + sizes.batch;
}

// T is bfloat16 or float16, the GPU at least sm_80. Of the scores' options softcap and ALiBi are
// served, with windows from 0 to kMostAttentionTokens. Fewer than 2^31 slots for all heads.
template <class T>
void varlen_attention(const VarlenAttentionArgs<T>& args, const PackedSizes& sizes, void* stream);

}  // namespace emblas::cuda
