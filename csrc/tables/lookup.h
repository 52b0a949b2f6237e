// What the CPU kernels of hashed and of composed tables share: prefetching, sums of rows.
#pragma once

#include <utility>

#include "common/simd.h"
#include "tables/tables.h"

namespace emblas {
namespace {

constexpr int kBlock = 64;                      // ids hashed at once
constexpr int64_t kCachedBytes = 4 << 20;       // a smaller table needs no prefetching
constexpr int64_t kLastLevelBytes = 128 << 20;  // a larger one lies in memory
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

// How near later rows are brought while others are added: of a table in the second-level cache
// nothing is, of one in the last level they go to the first. A CPU waits for few lines of memory on
// their way to the first level (Intel's for 16), for more on their way to the second.
enum class Fetch { nothing, first_level, second_level };

inline Fetch fetch_of(int64_t table_bytes) {
  if (table_bytes <= kCachedBytes) return Fetch::nothing;
  return table_bytes <= kLastLevelBytes ? Fetch::first_level : Fetch::second_level;
}
template <Fetch fetch>
void request_line(const char* line) {
  __builtin_prefetch(line, 0, fetch == Fetch::first_level ? 3 : 2);
}

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

// Rows to be added. While each is, the row `ahead` after it is asked for.
template <class T>
struct RowSpan {
  const T* const* rows;
  const Accumulator<T>* coefficients;
  int64_t ahead;

  const T* row(int l) const { return rows[l]; }
  const T* later_row(int l) const { return rows[l + ahead]; }
  Accumulator<T> coefficient(int l) const { return coefficients[l]; }
};

// Values [begin, begin + size) of add_rows: `vectors` vectors, the last of which ends where they
// do.
template <Fetch fetch, int vectors, class T, class Out, class List>
void add_piece(Out* to, const Accumulator<T>* from, const List& list, int count, int64_t begin,
               int64_t size) {
  constexpr int64_t lanes = kLanes<T>, bytes = vectors * lanes * int64_t(sizeof(T));
  const int64_t end = size - lanes;
  const auto at = [&](int u) { return u < vectors - 1 ? u * lanes : end; };
  const auto request = [&](int l) {
    if constexpr (fetch != Fetch::nothing) {
      const char* later = reinterpret_cast<const char*>(list.later_row(l) + begin);
      for (int64_t line = 0; line < bytes; line += kCacheLine) request_line<fetch>(later + line);
    }
  };
  Vector<T> sums[vectors];
  int l = 0;
  if (from) {
#pragma GCC unroll 16
    for (int u = 0; u < vectors; ++u) sums[u] = load(from + begin + at(u));
  } else {
    request(0);
#pragma GCC unroll 16
    for (int u = 0; u < vectors; ++u) {
      sums[u] = list.coefficient(0) * load(list.row(0) + begin + at(u));
    }
    l = 1;
  }
  for (; l < count; ++l) {
    request(l);
    const T* row = list.row(l) + begin;
    const Accumulator<T> coefficient = list.coefficient(l);
#pragma GCC unroll 16
    for (int u = 0; u < vectors; ++u) sums[u] += coefficient * load(row + at(u));
  }
#pragma GCC unroll 16
  for (int u = 0; u < vectors; ++u) store(to + begin + at(u), sums[u]);
}

// to = from + sum_l coefficient(l) * row(l), in this order, in registers: the same bits however a
// longer sum is cut into calls. Without `from` there must be a row. Each piece of a row is paid
// with a request for that of a later one: requests in a burst would fill the queue of cache misses
// and stall what comes after, and leave it empty while rows are added.
template <Fetch fetch, class T, class Out, class List>
void add_rows(Out* to, const Accumulator<T>* from, const List& list, int count, int64_t width) {
  constexpr int64_t lanes = kLanes<T>;
  if (width < lanes) {
    for (int64_t i = 0; i < width; ++i) {
      Accumulator<T> total = from ? from[i] : list.coefficient(0) * to_accumulator(list.row(0)[i]);
      for (int l = from ? 0 : 1; l < count; ++l) {
        total += list.coefficient(l) * to_accumulator(list.row(l)[i]);
      }
      from_accumulator(total, to + i);
    }
    return;
  }
  // Pieces of 8 vectors, as many sums as hide the latency of adding; the last piece has up to 9.
  int64_t i = 0;
  for (; width - i > 9 * lanes; i += 8 * lanes) {
    add_piece<fetch, 8, T>(to, from, list, count, i, 8 * lanes);
  }
  const int64_t rest = width - i;
  const auto add = [&]<int... vectors>(std::integer_sequence<int, vectors...>) {
    ((rest > vectors * lanes && rest <= (vectors + 1) * lanes &&
      (add_piece<fetch, vectors + 1, T>(to, from, list, count, i, rest), true)) ||
     ...);
  };
  add(std::make_integer_sequence<int, 9>{});
}

template <class T>
void store_row(T* to, const Accumulator<T>* from, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(to + i, load(from + i));
  for (; i < dim; ++i) from_accumulator(from[i], to + i);
}

// out_b = the sum, or mean, of the rows of the ids [position(b), position(b + 1)), for the bags
// [first, last). source.rows_per_id() rows belong to an id; source.list(id) are those of the ids
// [id, source.run_end(id, end)), a run up to `end` that stops before the padding id: it is empty
// there.
template <Fetch fetch, class T, class Source, class Position>
void sum_bags(Source& source, const Position& position, int64_t first, int64_t last, bool mean,
              int64_t width, Accumulator<T>* scratch, T* out, int64_t out_stride) {
  using A = Accumulator<T>;
  const int64_t rows_per_id = source.rows_per_id();
  for (int64_t b = first; b < last; ++b) {
    T* const to = out + b * out_stride;
    const int64_t end = position(b + 1);
    const A* from = nullptr;
    int64_t used = 0;
    bool stored = false;
    for (int64_t id = position(b), stop; id < end; id = stop) {
      const RowSpan<T> rows = source.list(id);
      stop = source.run_end(id, end);
      if (stop == id) {
        ++stop;
        continue;
      }
      const int count = int((stop - id) * rows_per_id);
      stored = stop == end && !mean;
      if (stored) add_rows<fetch, T>(to, from, rows, count, width);
      if (!stored) add_rows<fetch, T>(scratch, from, rows, count, width);
      from = scratch;
      used += stop - id;
    }
    if (stored) continue;
    if (used == 0) {
      std::memset(to, 0, width * sizeof(T));
      continue;
    }
    for (int64_t k = 0; mean && k < width; ++k) scratch[k] *= A(1) / A(used);
    store_row(to, scratch, width);
  }
}

// The same with requests as near as suits a table of so many bytes.
template <class T, class Source, class Position>
void sum_bags(Fetch fetch, Source& source, const Position& position, int64_t first, int64_t last,
              bool mean, int64_t width, Accumulator<T>* scratch, T* out, int64_t out_stride) {
  const auto run = [&]<Fetch constant>() {
    sum_bags<constant>(source, position, first, last, mean, width, scratch, out, out_stride);
  };
  if (fetch == Fetch::nothing) run.template operator()<Fetch::nothing>();
  if (fetch == Fetch::first_level) run.template operator()<Fetch::first_level>();
  if (fetch == Fetch::second_level) run.template operator()<Fetch::second_level>();
}

}  // namespace
}  // namespace emblas
