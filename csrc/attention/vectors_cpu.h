// Queries across the lanes of the vectors: the products and moves that forward and backward share.
//
// A tile of up to three vectors of queries is transposed once, x[c][query]. Products are then outer
// products of one broadcast element of K, V or the scores with vectors, accumulated in registers.
// So maximum and sum of the softmax run down the lanes without any shuffle, and the number of keys
// needs no rounding up.
// Each lane does the same arithmetic whatever its neighbours hold, which is why the bits of a query
// don't depend on the batch.
//
// Scores are kept in base 2: log2(e) is folded into the scale of the queries.
#pragma once

#include <type_traits>
#include <utility>

#include "attention/attention.h"
#include "common/simd.h"

namespace emblas {
namespace {

// A number known to the compiler, as an argument.
template <int n>
using Constant = std::integral_constant<int, n>;

constexpr int kTileVectors = 3;
// Elements broadcast at a time: kRows x kTileVectors accumulators fill the registers.
#if defined(EMBLAS_HAS_AVX512) || defined(EMBLAS_HAS_NEON)
constexpr int kRows = 8;  // of 32 registers
#else
constexpr int kRows = 4;  // of 16
#endif
constexpr int kKeyBlock = 64;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// --- the queries of a sequence, in tiles ---------------------------------------------------------

template <class T>
constexpr int64_t kTileQueries = kTileVectors * kLanes<T>;

// Vectors are dealt out evenly: four make two tiles of two.
template <class T>
struct Tiles {
  static constexpr int64_t lanes = kLanes<T>;
  const int64_t queries;
  const int64_t vectors = (queries + lanes - 1) / lanes;
  const int64_t count = (vectors + kTileVectors - 1) / kTileVectors;

  // The first query of a tile; of the one behind the last, how many queries there are.
  int64_t first(int64_t tile) const { return smaller(vectors * tile / count * lanes, queries); }

  // visit(vectors as a constant, first query, queries) of one tile.
  template <class Visit>
  void at(int64_t tile, const Visit& visit) const {
    const int64_t query = first(tile), size = first(tile + 1) - query;
    switch ((size + lanes - 1) / lanes) {
      case 1:
        return visit(Constant<1>{}, query, size);
      case 2:
        return visit(Constant<2>{}, query, size);
      default:
        return visit(Constant<3>{}, query, size);
    }
  }
};

// body(rows as a constant, first row) until `count` rows are done: 8 at a time, then 4, 2 and 1.
template <int rows = kRows, class Body>
inline void for_rows(int64_t count, const Body& body, int64_t row = 0) {
  for (; row + rows <= count; row += rows) body(Constant<rows>{}, row);
  if constexpr (rows > 1) for_rows<rows / 2>(count, body, row);
}

// Rows of accumulators, any stride apart.
template <class A>
struct Rows {
  A* data;
  int64_t stride;

  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// --- products ------------------------------------------------------------------------------------

// total[r][c] += sum_i a[r a_row + i a_step] b[i b_row + c] over i < depth. Inlined, so that the
// compiler sees that a and b aren't the total, and keeps it in registers.
template <int rows, int vectors, class V, class A>
[[gnu::always_inline]] inline void multiply_add(V (&total)[rows][vectors], const A* a,
                                                int64_t a_row, int64_t a_step, const A* b,
                                                int64_t b_row, int64_t depth) {
  constexpr int lanes = kLanes<A>;
  V sum[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; ++c) sum[r][c] = total[r][c];
  }
  for (int64_t i = 0; i < depth; ++i) {
    V right[vectors];
    for (int c = 0; c < vectors; ++c) right[c] = load(b + i * b_row + c * lanes);
    for (int r = 0; r < rows; ++r) {
      const V left = broadcast<V>(a[r * a_row + i * a_step]);
      for (int c = 0; c < vectors; ++c) sum[r][c] += left * right[c];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; ++c) total[r][c] = sum[r][c];
  }
}

// sums[j][0..dim) = weights[j row + i step] x[i][0..dim) summed over i < count, for all j < rows,
// added to what they are if `add`; dim in vectors.
template <bool add, class A>
void outer(Rows<A> sums, int64_t count_rows, int64_t dim, const A* weights, int64_t row,
           int64_t step, Rows<const A> x, int64_t count) {
  constexpr int lanes = kLanes<A>;
  const auto columns = [&]<int vectors>(Constant<vectors>, int64_t c) {
    for_rows(count_rows, [&]<int rows>(Constant<rows>, int64_t j) {
      Vector<A> total[rows][vectors] = {};
      A* const to = sums.data + j * sums.stride + c;
      for (int r = 0; add && r < rows; ++r) {
        for (int i = 0; i < vectors; ++i) total[r][i] = load(to + r * sums.stride + i * lanes);
      }
      multiply_add(total, weights + j * row, row, step, x.data + c, x.stride, count);
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < vectors; ++i) store(to + r * sums.stride + i * lanes, total[r][i]);
      }
    });
  };
  // Two or three vectors at a time: one alone would wait for its own sums.
  int64_t c = 0, left = (dim + lanes - 1) / lanes;
  for (; left == 3 || left > 4; left -= 3, c += 3 * lanes) {
    columns(Constant<3>{}, c);
  }
  for (; left >= 2; left -= 2, c += 2 * lanes) columns(Constant<2>{}, c);
  if (left) columns(Constant<1>{}, c);
}
template <class A>
void add_outer(Rows<std::type_identity_t<A>> sums, int64_t count_rows, int64_t dim,
               const A* weights, int64_t row, int64_t step, Rows<const std::type_identity_t<A>> x,
               int64_t count) {
  outer<true, A>(sums, count_rows, dim, weights, row, step, x, count);
}
template <class A>
void set_outer(Rows<std::type_identity_t<A>> sums, int64_t count_rows, int64_t dim,
               const A* weights, int64_t row, int64_t step, Rows<const std::type_identity_t<A>> x,
               int64_t count) {
  outer<false, A>(sums, count_rows, dim, weights, row, step, x, count);
}

// --- memory --------------------------------------------------------------------------------------

// `count` values of a vector, zero in the lanes beyond.
template <class T>
inline Vector<T> load_part(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
  Vector<T> x{};
  for (int64_t i = 0; i < count; ++i) x[i] = to_accumulator(from[i]);
  return x;
}
template <class T>
inline void store_part(T* to, Vector<T> x, int64_t count) {
  if (count >= kLanes<T>) return store(to, x);
  for (int64_t i = 0; i < count; ++i) from_accumulator(x[i], to + i);
}

// x <- its transpose: blocks of 1, 2, 4, ... lanes are exchanged across the diagonal.
template <int width, class V, int... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane & width ? lanes + lane - width : lane)...);
  const V high = __builtin_shufflevector(a, b, (lane & width ? lanes + lane : lane + width)...);
  a = low;
  b = high;
}
template <int width = 1, class V, size_t lanes>
inline void transpose(V (&x)[lanes]) {
  if constexpr (width < int(lanes)) {
#pragma GCC unroll 64
    for (int i = 0; i < int(lanes); ++i) {
      if (!(i & width)) {
        exchange<width>(x[i], x[i + width], std::make_integer_sequence<int, lanes>{});
      }
    }
    transpose<2 * width>(x);
  }
}

// x[index] in each lane, the index modulo the lanes.
template <class V, class Index>
inline V permute(V x, Index index) {
#if defined(__clang__)
  constexpr int lanes = sizeof index / sizeof index[0];
  V out;
  for (int lane = 0; lane < lanes; ++lane) out[lane] = x[index[lane] & (lanes - 1)];
  return out;
#else
  return __builtin_shuffle(x, index);
#endif
}
template <class V, int... lane>
inline V reversed(V x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (int(sizeof...(lane)) - 1 - lane)...);
}
template <class V>
inline V reversed(V x) {
  return reversed(x, std::make_integer_sequence<int, sizeof x / sizeof x[0]>{});
}

// visit(x, c, i): x[lane] holds element c + lane of the rows i to i + lanes of `from`, for all
// blocks of dim elements and `vectors` vectors of rows. Rows beyond `count` repeat the last one,
// elements beyond dim are zero.
template <int vectors, class T, class Visit>
inline void for_transposed(const T* from, int64_t stride, int64_t count, int64_t dim,
                           const Visit& visit) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < dim; c += lanes) {
    for (int64_t i = 0; i < vectors * lanes; i += lanes) {
      Vector<T> x[lanes];
      if (i + lanes <= count && c + lanes <= dim) {  // in registers
#pragma GCC unroll 64
        for (int lane = 0; lane < lanes; ++lane) x[lane] = load(from + (i + lane) * stride + c);
      } else {
        Vector<T> part[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
          part[lane] = load_part(from + smaller(i + lane, count - 1) * stride + c, dim - c);
        }
#pragma GCC unroll 64
        for (int lane = 0; lane < lanes; ++lane) x[lane] = part[lane];
      }
      transpose(x);
      visit(x, c, i);
    }
  }
}

// to[c][i] = factor from[i][c], to of `vectors` vectors and dim rows rounded up to lanes.
template <int vectors, class T>
inline void read_transposed(const T* from, int64_t stride, int64_t count, int64_t dim,
                            Accumulator<T> factor, Accumulator<T>* to) {
  constexpr int lanes = kLanes<T>;
  for_transposed<vectors>(from, stride, count, dim, [&](auto& x, int64_t c, int64_t i) {
#pragma GCC unroll 64
    for (int lane = 0; lane < lanes; ++lane) {
      store(to + (c + lane) * vectors * lanes + i, factor * x[lane]);
    }
  });
}

// to[i][c] = from[c][i].
template <int vectors, class T>
inline void write_transposed(const T* from, int64_t count, int64_t dim, T* to, int64_t stride) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    for (int64_t c = 0; c < dim; c += lanes) {
      Vector<T> x[lanes];
#pragma GCC unroll 64
      for (int lane = 0; lane < lanes; ++lane)
        x[lane] = load(from + (c + lane) * vectors * lanes + i);
      transpose(x);
      Vector<T> rows[lanes];
#pragma GCC unroll 64
      for (int lane = 0; lane < lanes; ++lane) rows[lane] = x[lane];
      for (int64_t lane = 0; lane < smaller(lanes, count - i); ++lane) {
        store_part(to + (i + lane) * stride + c, rows[lane], dim - c);
      }
    }
  }
}

// The vectors of `count` tokens as accumulators, zeros behind each up to a multiple of the lanes:
// in place where they lie close together, or copied into scratch. One head of many has its vectors
// far apart, often in as many pages, and the products pass over them tile after tile.
template <class T>
Rows<const Accumulator<T>> near(const HeadVectors<const T>& x, int64_t token, int64_t head,
                                int64_t count, int64_t dim, Accumulator<T>* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  const T* from = x.at(token, head);
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    constexpr int64_t close = 1024;  // bytes; farther apart, copying paid where it was measured
    if (dim % lanes == 0 && x.token_stride * int64_t(sizeof(T)) <= close) {
      return {from, x.token_stride};
    }
  }
  const int64_t stride = round_up(dim, lanes);
  for (int64_t i = 0; i < count; ++i, from += x.token_stride) {
    Accumulator<T>* const to = scratch + i * stride;
    int64_t c = 0;
    for (; c + lanes <= dim; c += lanes) store(to + c, load(from + c));
    if (c < dim) store(to + c, load_part(from + c, dim - c));
  }
  return {scratch, stride};
}

// Rows that will be written: stores to lines that are in no cache hold up what comes behind them.
template <class T>
void fetch_rows(const HeadVectors<T>& x, int64_t token, int64_t head, int64_t count, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  T* row = x.at(token, head);
  for (int64_t i = 0; i < count; ++i, row += x.token_stride) {
    for (int64_t c = 0; c < dim; c += line) __builtin_prefetch(row + c, 1, 2);
  }
}

// near() the other way: rows of accumulators become the vectors of `count` tokens.
template <class T>
void write_rows(Rows<const Accumulator<T>> rows, const HeadVectors<T>& x, int64_t token,
                int64_t head, int64_t count, int64_t dim) {
  T* to = x.at(token, head);
  for (int64_t i = 0; i < count; ++i, to += x.token_stride) {
    for (int64_t c = 0; c < dim; c += kLanes<T>) {
      store_part(to + c, load(rows.data + i * rows.stride + c), dim - c);
    }
  }
}

}  // namespace
}  // namespace emblas
