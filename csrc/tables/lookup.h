// What the CPU kernels of hashed and of composed tables share: prefetching, sums of rows.
#pragma once

#include "common/simd.h"
#include "tables/tables.h"

namespace emblas {
namespace {

constexpr int kBlock = 64;                 // ids hashed at once
constexpr int kPrefetchAhead = 8;          // ids
constexpr int64_t kCachedBytes = 1 << 20;  // a smaller table needs no prefetching
constexpr int kCacheLine = 64;

template <class T>
void prefetch(const T* row, int64_t dim) {
  const char* begin = reinterpret_cast<const char*>(row);
  const char* end = reinterpret_cast<const char*>(row + dim);
  for (; begin < end; begin += kCacheLine) __builtin_prefetch(begin);
}

// to[i] = weight * sum_j rows[j][i], added to what `to` holds if `add`. A vector that would pass
// the end is moved back over the one before; what it adds to is read before the loop.
template <bool add, int fixed_count, class Out, class T>
void sum_rows(Out* to, const T* const* rows, int given_count, Accumulator<T> weight, int64_t dim) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>, unroll = 4;
  const int count = fixed_count ? fixed_count : given_count;
  if (dim < lanes) {
    for (int64_t i = 0; i < dim; ++i) {
      A total = to_accumulator(rows[0][i]);
      for (int j = 1; j < count; ++j) total += to_accumulator(rows[j][i]);
      total *= weight;
      if constexpr (add) total += to[i];
      from_accumulator(total, to + i);
    }
    return;
  }
  const auto vector_sum = [&](int64_t i) {
    V total = load(rows[0] + i);
    for (int j = 1; j < count; ++j) total += load(rows[j] + i);
    total *= weight;
    if constexpr (add) total += load(to + i);
    return total;
  };
  const int64_t tail = dim - lanes;
  const V last = vector_sum(tail);
  int64_t i = 0;
  for (; i + unroll * lanes <= dim; i += unroll * lanes) {
    V total[unroll];
    for (int u = 0; u < unroll; ++u) total[u] = load(rows[0] + i + u * lanes);
    for (int j = 1; j < count; ++j) {
      for (int u = 0; u < unroll; ++u) total[u] += load(rows[j] + i + u * lanes);
    }
    for (int u = 0; u < unroll; ++u) {
      total[u] *= weight;
      if constexpr (add) total[u] += load(to + i + u * lanes);
      store(to + i + u * lanes, total[u]);
    }
  }
  for (; i < tail; i += lanes) store(to + i, vector_sum(i));
  store(to + tail, last);
}

// The usual four rows are a constant, over which the loops unroll.
template <bool add, class Out, class T>
void sum_rows(Out* to, const T* const* rows, int count, Accumulator<T> weight, int64_t dim) {
  if (count == 4) {
    sum_rows<add, 4>(to, rows, count, weight, dim);
  } else {
    sum_rows<add, 0>(to, rows, count, weight, dim);
  }
}

template <class T>
void store_row(T* to, const Accumulator<T>* from, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(to + i, load(from + i));
  for (; i < dim; ++i) from_accumulator(from[i], to + i);
}

}  // namespace
}  // namespace emblas
