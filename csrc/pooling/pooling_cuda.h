// Segment pooling on a GPU: what the .cu files of this folder launch, for all segments of a batch,
// on a stream (a cudaStream_t), never waiting. The formulas stand in pooling.h.
#pragma once

#include "pooling/pooling.h"

namespace emblas::cuda {

// Segments of any form, and what positions and rows there are.
template <class T>
struct SegmentRows {
  Segments<T> segments;
  int64_t batch, positions, rows;
};

// --- forward ---------------------------------------------------------------------------------

inline constexpr int64_t kChunkRows = 128;  // rows that are added up together

// Places for all chunks of segments in order, known without reading where they are.
inline int64_t chunk_slots(int64_t batch, int64_t positions) {
  return batch + positions / kChunkRows;
}

template <class T>
struct SegmentSums {
  SegmentRows<T> rows;
  PoolMode mode;
  bool chunked;                 // segments share no position and are in order: cut them
  const Accumulator<T>* power;  // [1] of the generalized mean, which adds up powers; or null
  Accumulator<T> epsilon;       // its least value
  Accumulator<T>* partial;      // workspace [slots(), dim]

  // Blocks, one for each chunk or segment.
  int64_t slots() const { return chunked ? chunk_slots(rows.batch, rows.positions) : rows.batch; }
};

// out is stored as T or, with `wide`, as the accumulator; so are its gradients.
template <class T>
struct SegmentPoolArgs {
  SegmentSums<T> sums;
  bool normalize, wide;
  void* out;             // [batch, dim]
  Accumulator<T>* norm;  // [batch] |m_b|, written if normalize
};
template <class T>
void segment_pool(const SegmentPoolArgs<T>& args, void* stream);

// Several modes at once. `sums` are those of the mode mean.
template <class T>
struct SegmentPoolModesArgs {
  SegmentSums<T> sums;  // its workspace, and those that follow: null where no mode needs it
  PoolModes modes;
  bool wide;
  Accumulator<T>* stepped;  // workspace [slots(), dim]: sums by position
  Accumulator<T>* largest;  // workspace [slots(), dim]
  int32_t* where;           // workspace [slots(), dim]: positions of the largest
  void* out;                // [batch, modes, dim]
  int32_t* argmax;          // [batch, dim] if max is a mode
};
template <class T>
void segment_pool_modes(const SegmentPoolModesArgs<T>& args, void* stream);

// out: [batch, dim].
template <class T>
void segment_gem(const SegmentSums<T>& sums, Accumulator<T>* out, void* stream);

// out, argmax: [batch, dim].
template <class T>
void segment_max(const SegmentRows<T>& rows, T* out, int32_t* argmax, void* stream);

// --- backward --------------------------------------------------------------------------------

// What the gradients of a segment's tokens have in common, made once per segment, and where to find
// it: all workspaces.
template <class T>
struct Contributions {
  using A = Accumulator<T>;
  SegmentRows<T> rows;
  PoolModes modes;
  int32_t *begin, *end;   // [batch] positions that any mode pools
  int32_t *first, *last;  // [batch, modes] positions that are pooled; `begin`, `end` if by one mode
  int32_t* owner;         // [positions] 1 + the segment of each, or 0 where none; null if no index
  A* shared;              // [batch, modes, dim] what a token of weight 1 gets
  A* along;               // [batch, modes] what the gradients of weights lose
  int64_t* fingerprint;   // [batch] hashes of what segments contribute; null if in order
  const int32_t* argmax;  // [batch, dim] positions of the maxima, if max is a mode
};

// The order in which segments, or positions of an index, are looked for.
struct Order {
  const int64_t* order;   // [size] their numbers, or null where each is its own
  const int32_t* starts;  // [size] rising: first positions, or rows
  const int32_t* reach;   // [size] rising: how far those up to here go, or rows
  int64_t size;
};

template <class T>
struct SegmentPoolBackwardArgs {
  Contributions<T> parts;
  bool normalize, wide;
  const void* grad_out;        // [batch, modes, dim]
  const void* out;             // [batch, modes, dim]
  const Accumulator<T>* norm;  // [batch], read if normalize
};
// Fill the contributions.
template <class T>
void segment_pool_contributions(const SegmentPoolBackwardArgs<T>& args, void* stream);
// grad_out, out: [batch, dim]; grad_power: [batch].
template <class T>
void segment_gem_contributions(const Contributions<T>& parts, const Accumulator<T>* power,
                               Accumulator<T> epsilon, const Accumulator<T>* grad_out,
                               const Accumulator<T>* out, Accumulator<T>* grad_power, void* stream);

// Order spans: fill order [batch], starts and reach [batch].
template <class T>
void order_spans(const Contributions<T>& parts, int64_t* order, int32_t* starts, int32_t* reach,
                 void* stream);
// keys [positions]: the row of each position that a segment owns; the number of rows elsewhere.
template <class T>
void row_keys(const Contributions<T>& parts, int32_t* keys, void* stream);

// grad_x [rows, dim]; `order` is that of segments or, with an index, of positions by row. With
// `power`, times the derivative of the powers.
template <class T>
void row_gradients(const Contributions<T>& parts, const Order& order, const Accumulator<T>* power,
                   Accumulator<T> epsilon, T* grad_x, void* stream);
// grad_weights [positions]; `order` is that of segments. With `power`, of powers of the rows.
template <class T>
void weight_gradients(const Contributions<T>& parts, const Order& order,
                      const Accumulator<T>* power, Accumulator<T> epsilon,
                      Accumulator<T>* grad_weights, void* stream);

// grad_out, argmax: [batch, dim]; grad_x: [rows, dim], zeros.
template <class T>
void segment_max_backward(const T* grad_out, const int32_t* argmax, int64_t batch, int64_t rows,
                          int64_t dim, T* grad_x, void* stream);

}  // namespace emblas::cuda
