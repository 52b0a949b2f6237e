// Segment pooling on a GPU: what the .cu files of this folder launch, for all sequences of a batch,
// on a stream (a cudaStream_t), never waiting. The formulas stand in pooling.h; here are its
// weighted mean over cu_seqlens and its maximum, and their gradients.
#pragma once

#include "pooling/pooling.h"

namespace emblas::cuda {

template <class T>
struct SegmentPoolArgs {
  const T* x;          // [tokens, dim], rows `row_stride` elements apart
  int64_t row_stride;  //
  int64_t dim;
  const int32_t* cu_seqlens;      // [batch + 1]
  const Accumulator<T>* weights;  // [tokens] or null; rows of weight 0 are not read
  bool normalize;
  T* out;                // [batch, dim]
  Accumulator<T>* norm;  // [batch] |m_b|, written if normalize; may be null
};

template <class T>
struct SegmentPoolBackwardArgs {
  const T* grad_out;  // [batch, dim]
  const T* x;         // read only for grad_weights
  int64_t row_stride;
  const T* out;                // [batch, dim], read if normalize or for grad_weights
  const Accumulator<T>* norm;  // [batch], read if normalize
  int64_t dim;
  const int32_t* cu_seqlens;
  const Accumulator<T>* weights;
  bool normalize;
  T* grad_x;                     // [tokens, dim] or null
  Accumulator<T>* grad_weights;  // [tokens] or null
};

inline constexpr int64_t kChunkRows = 128;  // rows that one block adds up

// Blocks over the chunks of all segments, known without reading the offsets.
inline int64_t segment_pool_slots(int64_t batch, int64_t tokens) {
  return tokens / kChunkRows + batch;
}

// partial: workspace of segment_pool_slots x dim.
template <class T>
void segment_pool(const SegmentPoolArgs<T>& args, int64_t batch, int64_t tokens,
                  Accumulator<T>* partial, void* stream);

// scratch: workspace of batch x (dim + 2).
template <class T>
void segment_pool_backward(const SegmentPoolBackwardArgs<T>& args, int64_t batch, int64_t tokens,
                           Accumulator<T>* scratch, void* stream);

// Segments of any form, and what positions and rows there are.
template <class T>
struct SegmentRows {
  Segments<T> segments;
  int64_t positions, rows;
};

// out, argmax: [batch, dim].
template <class T>
void segment_max(const SegmentRows<T>& rows, int64_t batch, T* out, int32_t* argmax, void* stream);
// grad_out, argmax: [batch, dim]; grad_x: [rows, dim], zeros.
template <class T>
void segment_max_backward(const T* grad_out, const int32_t* argmax, int64_t batch, int64_t rows,
                          int64_t dim, T* grad_x, void* stream);

}  // namespace emblas::cuda
