// Vectors of chosen tokens against the tokens of their sequences: what attention is made of where
// few queries (or keys) are wanted, or the probabilities themselves.
//
// Row r of x meets the tokens start_r + j of y, j < length_r. Head h of x meets the head
// h' = h / (heads of x / heads of y) of y. With s[row][head][j], zero for j from length_r on:
//
//   dots    s_rhj = x_rh . y_(start_r + j)h'
//   sums    x_rh  = sum_j s_rhj y_(start_r + j)h'
//   outer   y_th' = sum of s_rhj x_rh over the r, h and j with start_r + j = t
//
// The gradients of each are the two others. Cost: 2 d flops for each s. Tokens of y are read once
// for each row, from a cache where rows of one sequence follow each other; only s is as long as
// length_r.
#pragma once

#include "attention/attention.h"

namespace emblas {

struct RowsShape {
  int64_t heads;            // of x and s
  int64_t heads_per_group;  // of x that share a head of y
  int64_t dim;
  int64_t max_length;  // of a row of s
  const int64_t *starts, *lengths;
};

template <class T>
struct AttentionRows {
  using A = Accumulator<T>;
  // Rows [first, last).
  void (*dots)(const RowsShape&, HeadVectors<const T> x, HeadVectors<const T> y, A* s,
               int64_t first, int64_t last);
  // scratch: heads x dim accumulators.
  void (*sums)(const RowsShape&, const A* s, HeadVectors<const T> y, HeadVectors<T> x,
               int64_t first, int64_t last, A* scratch);
  // All rows, heads [first, last) of y, which is added to.
  void (*outer)(const RowsShape&, const A* s, HeadVectors<const T> x, int64_t rows,
                HeadVectors<A> y, int64_t first, int64_t last);
};
using AttentionRowsKernels = ByDtype<AttentionRows>;

}  // namespace emblas
