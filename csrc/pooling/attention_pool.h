// Attention pooling: every sequence is seen by the same few queries u_h, in one pass over the
// tokens.
//
//   s_ht = scale u_h . x_t      p_ht = exp(s_ht - lse_bh), lse_bh = log sum_t exp(s_ht)
//   out_bh = sum_t p_ht x_t     over the tokens t of sequence b; zero where there are none
// The sums run online: with a running maximum m, what was summed so far is scaled by exp(m - m')
// when a block of tokens raises it to m'. Keys and values of the tokens are never made: a key
// projection is folded into u_h, a value projection follows out_bh, of which there are few.
//
// Backward, g_h = d loss / d out_bh, d_h = g_h . out_bh:
//   ds_ht = p_ht (g_h . x_t - d_h)
//   dx_t = sum_h p_ht g_h + scale ds_ht u_h        du_h = scale sum_t ds_ht x_t, by sequence
//
// Bytes: x is read once (and grad_x written once); 4 flops per element and query forward, 12
// backward, so up to two or three queries memory is the limit.
#pragma once

#include "pooling/segments.h"

namespace emblas {

template <class T>
struct AttentionPoolArgs {
  using A = Accumulator<T>;
  Segments<T> segments;  // in rising order, without a token in common; weights say which are there
  const A* queries;      // [heads, dim]
  int64_t heads;
  A scale;
  int64_t batch;
  int64_t tokens;
  A* out;  // [batch, heads, dim]
  A* lse;  // [batch, heads]
};

template <class T>
struct AttentionPoolBackwardArgs {
  using A = Accumulator<T>;
  AttentionPoolArgs<T> forward;  // with its results
  const A* grad_out;             // [batch, heads, dim]
  T* grad_x;                     // [tokens, dim]
  A* grad_queries;               // [batch, heads, dim]
};

template <class T>
struct AttentionPool {
  // Sequences [first, last). The scratch of backward holds 2 dim accumulators, that of
  // forward kAttentionBlock dim.
  void (*forward)(const AttentionPoolArgs<T>&, int64_t first, int64_t last,
                  Accumulator<T>* scratch);
  void (*backward)(const AttentionPoolBackwardArgs<T>&, int64_t first, int64_t last,
                   Accumulator<T>* scratch);
};
using AttentionPoolKernels = ByDtype<AttentionPool>;

inline constexpr int64_t kAttentionBlock = 8;  // tokens: at dim 1024, 32 KiB of floats
inline constexpr int64_t kMaxPoolQueries = 256;

}  // namespace emblas
