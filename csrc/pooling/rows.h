// Whole rows of `dim` values: the vector loops that the pooling kernels share.
#pragma once

#include "common/simd.h"
#include "pooling/segments.h"

namespace emblas {
namespace {

// total[i] += weight * row[i]
template <class T>
inline void add_row(Accumulator<T>* total, const T* row, Accumulator<T> weight, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(total + i, load(total + i) + weight * load(row + i));
  for (; i < dim; ++i) total[i] += weight * to_accumulator(row[i]);
}

// out[i] = factor * x[i]
template <class T, class A>
inline void scale_row(T* out, const A* x, A factor, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(out + i, factor * load(x + i));
  for (; i < dim; ++i) from_accumulator(factor * x[i], out + i);
}

// out[i] = x[i], widened
template <class T>
inline void widen_row(Accumulator<T>* out, const T* x, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(out + i, load(x + i));
  for (; i < dim; ++i) out[i] = to_accumulator(x[i]);
}

// scratch = sum of shares of rows
template <class A>
inline void sum_rows(const A* rows, int64_t dim, const RowShare<A>* shares, int64_t count,
                     A* scratch) {
  std::memset(scratch, 0, dim * sizeof(A));
  for (const RowShare<A>* share = shares; share < shares + count; ++share) {
    const A* row = rows + share->number * dim;
    if (!share->argmax) {
      add_row(scratch, row, share->factor, dim);
    } else {  // compilers turn it into compare and blend
      for (int64_t i = 0; i < dim; ++i) {
        scratch[i] += share->argmax[i] == share->position ? row[i] : A(0);
      }
    }
  }
}

// The running maximum of rows and, for each column, the first row that holds it. NaN is the
// largest. A plain loop, which compilers turn into compare and blend.
template <class A>
inline void take_larger(A* best, int32_t* argmax, const A* row, int32_t at, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) {
    const bool take = (row[i] > best[i]) | ((row[i] != row[i]) & (best[i] == best[i]));
    best[i] = take ? row[i] : best[i];
    argmax[i] = take ? at : argmax[i];
  }
}

}  // namespace
}  // namespace emblas
