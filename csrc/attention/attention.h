// Packed attention: every query attends to the keys of its own sequence, in one pass over them.
//
//   s_ij  = scale q_i . k_j                      for the keys j that query i may see, head by head
//   lse_i = log sum_j exp(s_ij)
//   out_i = sum_j exp(s_ij - lse_i) v_j          (zero, with lse_i = -inf, where i sees no key)
//
// Positions are counted within the sequence and aligned at its end, so that a chunk of queries may
// stand for the last tokens: p_i = i + (keys - queries). A window (left, right) lets query i see
// the keys p_i - left <= j <= p_i + right; causal attention is right = 0. With fewer key heads than
// query heads, query head h reads key head h / (query heads / key heads).
//
// Cost: 4 d flops for each pair (query, key) that is seen, and one exponential. Scores live in a
// cache-sized block; nothing of size (queries, keys) is made, so arithmetic is the only limit.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// Vectors x[token][head][0..d): the vectors themselves are contiguous, their order in memory is
// free (token-major, head-major, a slice of a fused projection).
template <class T>
struct HeadVectors {
  T* data;
  int64_t token_stride;
  int64_t head_stride;

  T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

template <class T>
struct VarlenAttentionArgs {
  HeadVectors<const T> q, k, v;
  HeadVectors<T> out;
  Accumulator<T>* lse;  // [heads][tokens], rows lse_stride apart; may be null
  int64_t lse_stride;
  int64_t heads;            // of q and out
  int64_t heads_per_group;  // query heads that share one key head
  int64_t head_dim;         // a multiple of 8, from kMinHeadDim to kMaxHeadDim
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  Accumulator<T> scale;
  int64_t window_left, window_right;  // keys seen on either side of p_i; negative: all
};

inline constexpr int64_t kMinHeadDim = 16;  // lanes of the widest vector
inline constexpr int64_t kMaxHeadDim = 256;

template <class T>
struct VarlenAttention {
  // One item is a tile of at most so many queries of one sequence and head; the items of a sequence
  // are numbered head by head.
  int64_t tile_queries;
  // Accumulators of scratch, 64-byte aligned, that forward needs.
  int64_t scratch_size;
  // Items [first, last) of one sequence.
  void (*forward)(const VarlenAttentionArgs<T>&, int64_t sequence, int64_t first, int64_t last,
                  Accumulator<T>* scratch);
};

struct AttentionKernels {
  VarlenAttention<float> float32;
  VarlenAttention<double> float64;

  const VarlenAttention<float>& of(float) const { return float32; }
  const VarlenAttention<double>& of(double) const { return float64; }
};

}  // namespace emblas
