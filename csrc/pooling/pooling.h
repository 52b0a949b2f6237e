// Segment pooling: token vectors of a packed batch to one vector per sequence, in one pass.
//
//   s_b   = sum_{t in segment b} w_t x_t          W_b = sum_{t in segment b} w_t   (w_t = 1 if
//   none) m_b   = s_b / W_b                             (zero where W_b == 0: "empty means zero")
//   out_b = m_b, or with normalize m_b / max(|m_b|, epsilon)
//
// Backward, g = d loss / d out, n_b = max(|m_b|, epsilon):
//   dm_b = g, or with normalize (g - out (out . g)) / n_b; where |m_b| <= epsilon: g / epsilon
//   dx_t = w_t / W_b dm_b                         dw_t = (x_t - m_b) . dm_b / W_b
//
// Bytes: x is read once and out written once; nothing of size (tokens, dim) is made. Both
// directions are bound by memory bandwidth (one add per element read or written).
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

inline constexpr double kNormalizeEpsilon = 1e-12;

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

template <class T>
struct SegmentPool {
  // Segments [first, last); scratch holds dim accumulators.
  void (*forward)(const SegmentPoolArgs<T>&, int64_t first, int64_t last, Accumulator<T>* scratch);
  void (*backward)(const SegmentPoolBackwardArgs<T>&, int64_t first, int64_t last,
                   Accumulator<T>* scratch);
};

using PoolingKernels = ByDtype<SegmentPool>;

// --- CUDA (segment_pool_cuda.cu): all sequences, on a stream (a cudaStream_t), never waiting -----

namespace cuda {

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

}  // namespace cuda

}  // namespace emblas
