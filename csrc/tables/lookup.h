// What the CPU kernels of hashed and of composed tables share: prefetching, sums of rows.
#pragma once

#include "common/simd.h"
#include "tables/tables.h"

namespace emblas {
namespace {

constexpr int kBlock = 64;                 // ids hashed at once
constexpr int64_t kCachedBytes = 1 << 20;  // a smaller table needs no prefetching
constexpr int kCacheLine = 64;

// Asks for every line that holds a byte of the row.
template <class T>
void prefetch(const T* row, int64_t dim) {
  const char* end = reinterpret_cast<const char*>(row + dim);
  const char* line = reinterpret_cast<const char*>(row);
  line -= reinterpret_cast<uintptr_t>(line) % kCacheLine;
  for (; line < end; line += kCacheLine) __builtin_prefetch(line);
  // GCC drops calls of functions that do nothing but prefetch, for want of an effect.
  asm volatile("");
}

// How many rows (or ids of several rows) of so many bytes may be on their way: those of half a
// first-level cache.
constexpr int prefetch_distance(int64_t bytes) {
  return bytes <= 512 ? 32 : bytes <= 8192 ? int(16384 / bytes) : 2;
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

// at(i, V{}) for every vector and every single value left over.
template <class T, class At>
void for_each_lane(int64_t width, const At& at) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) at(i, Vector<T>{});
  for (; i < width; ++i) at(i, Accumulator<T>{});
}
// put(i, at(i, V{})) over all values. A vector that would pass the end is moved back over the one
// before and computed first, so `at` may read what `put` writes.
template <class T, class At, class Put>
void map_lanes(int64_t width, const At& at, const Put& put) {
  constexpr int lanes = kLanes<T>;
  if (width < lanes) {
    for (int64_t i = 0; i < width; ++i) put(i, at(i, Accumulator<T>{}));
    return;
  }
  const int64_t tail = width - lanes;
  const auto last = at(tail, Vector<T>{});
  for (int64_t i = 0; i < tail; i += lanes) put(i, at(i, Vector<T>{}));
  put(tail, last);
}
template <class T, class V>
V value(const T* from, V) {
  if constexpr (sizeof(V) == sizeof(Accumulator<T>)) {
    return to_accumulator(*from);
  } else {
    return load(from);
  }
}
template <class Out>
void put(Out* to, Accumulator<Out> x) {
  from_accumulator(x, to);
}
template <class Out>
void put(Out* to, Vector<Out> x) {
  store(to, x);
}

// Rows to be added, or to be added later: where they are, and how many.
template <class T>
struct RowList {
  static constexpr int kMost = 32;
  int count = 0;
  const T* rows[kMost];
  const T* later[kMost];  // asked for while the row of the same number is added
  Accumulator<T> coefficients[kMost];
};

// total += sum_l coefficients[l] * rows[l], in this order, in registers: the same bits however a
// longer sum is cut into calls. If `ahead`, each piece of a row is paid with a request for that of
// a later one: requests in a burst would fill the queue of cache misses and stall what comes after,
// and leave it empty while rows are added.
template <bool ahead, class T>
void add_scaled(Accumulator<T>* total, const RowList<T>& list, int64_t width) {
  constexpr int lanes = kLanes<T>, unroll = 4;
  int64_t i = 0;
  for (; i + unroll * lanes <= width; i += unroll * lanes) {
    Vector<T> sums[unroll];
    for (int u = 0; u < unroll; ++u) sums[u] = load(total + i + u * lanes);
    for (int l = 0; l < list.count; ++l) {
      if constexpr (ahead) prefetch(list.later[l] + i, unroll * lanes);
      for (int u = 0; u < unroll; ++u) {
        sums[u] += list.coefficients[l] * load(list.rows[l] + i + u * lanes);
      }
    }
    for (int u = 0; u < unroll; ++u) store(total + i + u * lanes, sums[u]);
  }
  if (i == width) return;
  for (int l = 0; ahead && l < list.count; ++l) prefetch(list.later[l] + i, width - i);
  map_lanes<T>(
      width - i,
      [&](int64_t k, auto lane) {
        auto sum = value(total + i + k, lane);
        for (int l = 0; l < list.count; ++l) {
          sum += list.coefficients[l] * value(list.rows[l] + i + k, lane);
        }
        return sum;
      },
      [&](int64_t k, auto sum) { put(total + i + k, sum); });
}

// Adds rows to a total, some at a time.
template <class T>
class RowSum {
 public:
  // far: rows come from memory, and each is told which one to ask for meanwhile.
  RowSum(Accumulator<T>* total, int64_t width, bool far)
      : total_(total), width_(width), far_(far) {}

  void add(const T* row, Accumulator<T> coefficient, const T* later = nullptr) {
    list_.rows[list_.count] = row;
    list_.later[list_.count] = later;
    list_.coefficients[list_.count++] = coefficient;
    if (list_.count == RowList<T>::kMost) flush();
  }
  void flush() {
    if (list_.count > 0 && far_) add_scaled<true>(total_, list_, width_);
    if (list_.count > 0 && !far_) add_scaled<false>(total_, list_, width_);
    list_.count = 0;
  }

 private:
  Accumulator<T>* total_;
  int64_t width_;
  bool far_;
  RowList<T> list_;
};

template <class T>
void store_row(T* to, const Accumulator<T>* from, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(to + i, load(from + i));
  for (; i < dim; ++i) from_accumulator(from[i], to + i);
}

}  // namespace
}  // namespace emblas
