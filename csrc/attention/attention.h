// Packed attention: every query attends to the keys of its own sequence, in one pass over them.
//
//   s_ij  = cap(scale q_i . k_j) + bias_ij       for the keys j that query i may see, head by head
//   lse_i = log sum_j exp(s_ij)
//   p_ij  = exp(s_ij - lse_i)
//   out_i = sum_j p_ij v_j                       (zero, with lse_i = -inf, where i sees no key)
//
// Positions are counted within the sequence and aligned at its end, so that a chunk of queries may
// stand for the last tokens: p_i = i + (keys - queries). A window (left, right) lets query i see
// the keys p_i - left <= j <= p_i + right; causal attention is right = 0. With fewer key heads than
// query heads, query head h reads key head h / (query heads / key heads).
//
// Masks (ScoreArgs) open and close further pairs; the left radius always holds. A prefix opens its
// keys to every query, and a block id its own tokens to each other, past the right radius
// (prefix-LM, images in a causal sequence). A branch closes its keys to all other branches:
// sequences that share one context, of branch -1.
//
// cap(x) = c tanh(x / c), and bias_ij is a sum of: -slope_h |j - p_i| (ALiBi); a table b_h[j - p_i]
// that is constant beyond its ends (T5); the disentangled scores of DeBERTa-v2, where the position
// vectors pk, pq have heads like k and q, and r falls to the same run of distances for j - p_i:
//
//   scale (q_i . pk_r + k_j . pq_r),       r = run(j - p_i);
//
// and a number of its own for each pair.
//
// Dropout multiplies p_ij in out_i by m_ij, which is 0 with probability P and 1 / (1 - P)
// otherwise, and a pure function of the sequence's seed, head, p_i and j.
//
// Backward, from q, k, v, out and lse, with g_i = d loss / d out_i and l_i = d loss / d lse_i:
//
//   D_i   = out_i . g_i - l_i
//   ds_ij = p_ij (m_ij v_j . g_i - D_i)
//   dq_i  = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i m_ij p_ij g_i
//   db_h[x] = sum of ds_ij over all j - p_i = x
//   dpk_r = scale sum of ds_ij q_i,  dpq_r = scale sum of ds_ij k_j, over all run(j - p_i) = r
//
// (with ds_ij times cap'(scale q_i . k_j) in dq and dk; position vectors add theirs to both).
//
// Cost: 4 d flops forward and 10 d backward for each pair (query, key) that is seen, and one
// exponential. Scores live in a cache-sized block; nothing of size (queries, keys) is made, so
// arithmetic is the only limit.
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

  EMBLAS_HOST_DEVICE T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// Position vectors of the runs of distances, x[head][run][0..stride): padded with zeros to vectors
// of any width. A run is a row of distances that share one vector, so that what a block of pairs
// needs of them lies together, and is no more than its distances.
template <class A>
struct PositionVectors {
  const A* keys = nullptr;       // pk, heads of k; null: none
  const A* queries = nullptr;    // pq, heads of q; null: none
  const int32_t* run = nullptr;  // of the distances -radius to radius, from 0 by steps of 0 or 1
  int64_t radius = 0;            // farther distances are of the first or last run
  int64_t runs = 0;
  int64_t stride = 0;

  int64_t run_of(int64_t distance) const {
    const int64_t inside = distance < -radius ? -radius : distance > radius ? radius : distance;
    return run[inside + radius];
  }
  [[gnu::always_inline]] bool any() const { return run != nullptr; }
};
inline constexpr int64_t kPositionPadding = 16;  // the stride of position vectors is a multiple

// A number for each pair: a matrix [queries][keys] for each sequence and head.
template <class E>
struct PairMatrices {
  E* data = nullptr;
  const int64_t* starts = nullptr;  // of the sequences' first matrices
  int64_t head_stride = 0;
  int64_t query_stride = 0;  // negative: as many as the sequence has keys

  E* at(int64_t sequence, int64_t head, int64_t query, int64_t keys) const {
    return data + starts[sequence] + head * head_stride + query * stride(keys);
  }
  int64_t stride(int64_t keys) const { return query_stride < 0 ? keys : query_stride; }
};

template <class A>
struct Dropout {
  const int64_t* seeds = nullptr;  // of the sequences; null: no dropout
  uint32_t threshold = 0;          // random words below it are dropped
  A factor = 1;                    // of the others
};

// What scores are made of beside q . k, and who sees whom beside the windows. All optional.
template <class A>
struct ScoreArgs {
  A softcap = 0;                    // c; 0: none
  const A* alibi_slopes = nullptr;  // of the heads, alibi_stride apart from sequence to sequence
  int64_t alibi_stride = 0;
  const A* distance_bias = nullptr;  // [heads][2 radius + 1], the middle is distance 0
  int64_t distance_radius = 0;
  const int32_t* prefix_len = nullptr;  // [sequences]
  const int32_t* branch = nullptr;      // [tokens of k]
  const int32_t* block_ids = nullptr;   // [tokens of k]; negative: in no block
  PositionVectors<A> positions = {};
  PairMatrices<const A> pair_bias = {};
  Dropout<A> dropout = {};  // of the probabilities: scores don't depend on it

  // Inlined whatever the compiler thinks of it: a copy outside would be shared by the ISAs.
  [[gnu::always_inline]] bool biased() const { return alibi_slopes || distance_bias; }
  [[gnu::always_inline]] bool masked() const { return prefix_len || branch || block_ids; }
  [[gnu::always_inline]] bool plain() const {
    return softcap == 0 && !biased() && !masked() && !positions.any() && !pair_bias.data;
  }
};

template <class T>
struct VarlenAttentionArgs {
  HeadVectors<const T> q, k, v;
  HeadVectors<T> out;   // backward reads it
  Accumulator<T>* lse;  // [heads][tokens], rows lse_stride apart; null: forward drops it
  int64_t lse_stride;
  int64_t heads;            // of q and out
  int64_t heads_per_group;  // query heads that share one key head
  int64_t head_dim;         // of q and k, 1 to kMaxHeadDim
  int64_t value_dim;        // of v and out, 1 to kMaxHeadDim
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  Accumulator<T> scale;
  int64_t window_left, window_right;  // keys seen on either side of p_i; negative: all
  ScoreArgs<Accumulator<T>> scores = {};
};

inline constexpr int64_t kMaxHeadDim = 512;

template <class T>
struct VarlenAttention {
  // One item is a tile of at most so many queries of one sequence and head; the items of a sequence
  // are numbered head by head.
  int64_t tile_queries;
  // Accumulators of scratch, 64-byte aligned, that the first `batch` sequences need.
  int64_t (*scratch_size)(const VarlenAttentionArgs<T>&, int64_t batch);
  // Items [first, last) of one sequence.
  void (*forward)(const VarlenAttentionArgs<T>&, int64_t sequence, int64_t first, int64_t last,
                  Accumulator<T>* scratch);
};

template <class T>
struct VarlenAttentionBackwardArgs {
  VarlenAttentionArgs<T> forward;
  HeadVectors<const T> grad_out;
  const Accumulator<T>* grad_lse;  // like lse; null: zero
  HeadVectors<T> grad_q, grad_k, grad_v;
  // The sums of ds_ij by distance of each sequence alone, [heads][tokens of q and k]: those of
  // sequence b start at cu_seqlens_q[b] + cu_seqlens_k[b], with distance 1 - keys. Null: unwanted.
  Accumulator<T>* distance_sums = nullptr;
  int64_t distance_sums_stride = 0;
  // Likewise dpk and dpq, [heads][tokens of q and k][stride of the position vectors]: those of
  // sequence b start at row cu_seqlens_q[b] + cu_seqlens_k[b], with the run of distance 1 - keys.
  Accumulator<T>* position_key_sums = nullptr;
  Accumulator<T>* position_query_sums = nullptr;
  int64_t position_sums_stride = 0;  // from head to head
  // ds_ij itself, where a block of pairs is seen: filled with zeros before. Null data: unwanted.
  PairMatrices<Accumulator<T>> grad_pair_bias = {};

  // Whether sums of ds_ij without the scale are wanted.
  bool unscaled() const { return distance_sums || grad_pair_bias.data; }
};

template <class T>
struct VarlenAttentionBackward {
  // Accumulators of scratch, 64-byte aligned, that the first `batch` sequences need.
  int64_t (*scratch_size)(const VarlenAttentionBackwardArgs<T>&, int64_t batch);
  // Key heads [first, last) of one sequence, each with its group of query heads.
  void (*backward)(const VarlenAttentionBackwardArgs<T>&, int64_t sequence, int64_t first,
                   int64_t last, Accumulator<T>* scratch);
};

using AttentionKernels = ByDtype<VarlenAttention>;
using AttentionBackwardKernels = ByDtype<VarlenAttentionBackward>;

}  // namespace emblas
