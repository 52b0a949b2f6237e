// Packed attention on a GPU: what varlen_attention_cuda.cu and varlen_attention_backward_cuda.cu
// launch, on a stream (a cudaStream_t), never waiting.
#pragma once

#include "attention/attention.h"

namespace emblas::cuda {

struct PackedSizes {
  int64_t batch, queries, keys;  // sequences; tokens of q and of k
};
inline constexpr int64_t kMostAttentionTokens = int64_t(1) << 30;  // of q or k, less than
inline constexpr int64_t kWidestHead = 256;  // head_dim and value_dim, at most
inline constexpr int kTileRows = 64;         // queries, or keys, that a block owns

// Sequences are cut into tiles of queries, or keys, for blocks to take. Which tile has a block?
// Sequence b starts at slot begin_b / kTileRows + b. It needs ceil(length / kTileRows) slots at
// most and the next one starts no earlier, so slots are unique, and the host knows their number
// without reading offsets. A block finds its sequence by binary search; a few slots stay idle.
inline int64_t attention_slots(int64_t tokens, int64_t batch) { return tokens / kTileRows + batch; }

// T is bfloat16 or float16, the GPU at least sm_80. Of the scores' options softcap and ALiBi are
// served, with windows from 0 to kMostAttentionTokens. Fewer than 2^31 slots for all heads.
template <class T>
void varlen_attention(const VarlenAttentionArgs<T>& args, const PackedSizes& sizes, void* stream);

// The gradients of q, k and v of the same calls, with fewer than 2^31 slots of keys for all of
// their heads. deltas is a workspace of lse's shape.
template <class T>
void varlen_attention_backward(const VarlenAttentionBackwardArgs<T>& args, float* deltas,
                               const PackedSizes& sizes, int64_t key_heads, void* stream);

}  // namespace emblas::cuda
