// What the CPU kernels of hashed and of composed tables share: prefetching, sums of rows.
#pragma once

#include <utility>

#include "common/simd.h"
#include "tables/tables.h"

namespace emblas {
namespace {

constexpr int kBlock = 64;                 // ids hashed at once
constexpr int64_t kCachedBytes = 1 << 20;  // a smaller table needs no prefetching
constexpr int kCacheLine = 64;

// The low words of a times b.
inline vuint64 multiply(vuint64 a, uint32_t b) {
#if defined(EMBLAS_HAS_AVX512)
  return (vuint64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(EMBLAS_HAS_AVX2)
  return (vuint64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffff) * uint64_t(b);
#endif
}

// Modulo (common/hash.h) of a key in each lane, by products of words only.
class VectorModulo {
 public:
  explicit VectorModulo(uint64_t divisor)
      : divisor_(uint32_t(divisor)),
        reciprocal_(Modulo::reciprocal(divisor)),
        all_(divisor == uint64_t(1) << 32) {}

  vuint64 operator()(vuint64 key) const {
    if (all_) return key;
    const vuint64 fraction =
        multiply(key, uint32_t(reciprocal_)) + (multiply(key, uint32_t(reciprocal_ >> 32)) << 32);
    return (multiply(fraction >> 32, divisor_) + (multiply(fraction, divisor_) >> 32)) >> 32;
  }

 private:
  uint32_t divisor_;
  uint64_t reciprocal_;
  bool all_;  // no word holds the divisor
};

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

// Rows to be added: where they are, and which to ask for while the row of the same number is added.
template <class T>
struct RowList {
  static constexpr int kMost = 32;
  const T* rows[kMost];
  const T* later[kMost];
  Accumulator<T> coefficients[kMost];

  const T* row(int l) const { return rows[l]; }
  const T* later_row(int l) const { return later[l]; }
  Accumulator<T> coefficient(int l) const { return coefficients[l]; }
};

// Values [begin, begin + size) of add_scaled: `vectors` vectors, the last of which ends where they
// do.
template <bool ahead, int vectors, class T, class List>
void add_piece(Accumulator<T>* total, const List& list, int count, int64_t begin, int64_t size) {
  constexpr int64_t lanes = kLanes<T>, bytes = vectors * lanes * int64_t(sizeof(T));
  const int64_t end = size - lanes;
  total += begin;
  Vector<T> sums[vectors];
#pragma GCC unroll 16
  for (int u = 0; u < vectors - 1; ++u) sums[u] = load(total + u * lanes);
  sums[vectors - 1] = load(total + end);
  for (int l = 0; l < count; ++l) {
    if constexpr (ahead) {
      const char* later = reinterpret_cast<const char*>(list.later_row(l) + begin);
      for (int64_t line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(later + line);
    }
    const T* row = list.row(l) + begin;
    const Accumulator<T> coefficient = list.coefficient(l);
#pragma GCC unroll 16
    for (int u = 0; u < vectors - 1; ++u) sums[u] += coefficient * load(row + u * lanes);
    sums[vectors - 1] += coefficient * load(row + end);
  }
#pragma GCC unroll 16
  for (int u = 0; u < vectors - 1; ++u) store(total + u * lanes, sums[u]);
  store(total + end, sums[vectors - 1]);
}

// total += sum_l coefficient(l) * row(l), in this order, in registers: the same bits however a
// longer sum is cut into calls. If `ahead`, each piece of a row is paid with a request for that of
// a later one: requests in a burst would fill the queue of cache misses and stall what comes after,
// and leave it empty while rows are added.
template <bool ahead, class T, class List>
void add_scaled(Accumulator<T>* total, const List& list, int count, int64_t width) {
  constexpr int64_t lanes = kLanes<T>;
  if (width < lanes) {
    for (int64_t i = 0; i < width; ++i) {
      for (int l = 0; l < count; ++l) {
        total[i] += list.coefficient(l) * to_accumulator(list.row(l)[i]);
      }
    }
    return;
  }
  // Pieces of 8 vectors, as many sums as hide the latency of adding; the last piece has up to 9.
  int64_t i = 0;
  for (; width - i > 9 * lanes; i += 8 * lanes) {
    add_piece<ahead, 8, T>(total, list, count, i, 8 * lanes);
  }
  const int64_t rest = width - i;
  const auto add = [&]<int... vectors>(std::integer_sequence<int, vectors...>) {
    ((rest > vectors * lanes && rest <= (vectors + 1) * lanes &&
      (add_piece<ahead, vectors + 1, T>(total, list, count, i, rest), true)) ||
     ...);
  };
  add(std::make_integer_sequence<int, 9>{});
}

// Adds rows to a total, some at a time. The list is the caller's, so that the count, whose address
// nobody takes, stays in a register.
template <class T>
class RowSum {
 public:
  // far: rows come from memory, and each is told which one to ask for meanwhile.
  RowSum(RowList<T>& list, Accumulator<T>* total, int64_t width, bool far)
      : list_(list), total_(total), width_(width), far_(far) {}

  void add(const T* row, Accumulator<T> coefficient, const T* later = nullptr) {
    list_.rows[count_] = row;
    if (far_) list_.later[count_] = later;
    list_.coefficients[count_++] = coefficient;
    if (count_ == RowList<T>::kMost) flush();
  }
  void flush() {
    if (count_ > 0 && far_) add_scaled<true, T>(total_, list_, count_, width_);
    if (count_ > 0 && !far_) add_scaled<false, T>(total_, list_, count_, width_);
    count_ = 0;
  }

 private:
  RowList<T>& list_;
  Accumulator<T>* total_;
  int64_t width_;
  bool far_;
  int count_ = 0;
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
