// Attention pooling on a GPU: what attention_pool_cuda.cu launches on a stream (a cudaStream_t),
// never waiting. The formulas stand in attention_pool.h.
#pragma once

#include "pooling/pooling_cuda.h"

namespace emblas::cuda {

template <class T>
struct AttentionArgs {
  using A = Accumulator<T>;
  SegmentRows<T> rows;  // segments in rising order, without a row in common
  const A* queries;     // [heads, dim]
  int64_t heads;
  A scale;
};

// What the parts of a segment (kChunkRows positions each, in chunk_slots) hand on.
template <class A>
struct AttentionParts {
  A* sums;     // [slots, heads, dim], of rows weighted by exp(score - largest)
  A* largest;  // [slots, heads] score; then the part's factor
  A* total;    // [slots, heads], of exp(score - largest)
};

// out: [batch, heads, dim]; lse: [batch, heads].
template <class T>
void attention_pool(const AttentionArgs<T>& args, const AttentionParts<Accumulator<T>>& parts,
                    Accumulator<T>* out, Accumulator<T>* lse, void* stream);

template <class T>
struct AttentionGradients {
  using A = Accumulator<T>;
  const A* grad_out;  // [batch, heads, dim], as out
  const A* out;
  const A* lse;     // [batch, heads]
  A* sums;          // [slots, heads, dim]: a workspace, as the next two
  A* share;         // [positions, heads] p_ht
  A* slope;         // [positions, heads] scale ds_ht
  T* grad_x;        // [positions, dim], zeros where no segment is
  A* grad_queries;  // [batch, heads, dim]
};

template <class T>
void attention_pool_backward(const AttentionArgs<T>& args, const AttentionGradients<T>& gradients,
                             void* stream);

}  // namespace emblas::cuda
