// Exact search, rescoring and late interaction over the kernels of dots.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "binary/dots.h"
#include "binary/search.h"
#include "common/isa.h"
#include "common/types.h"

namespace emblas {

enum class Metric { dot, cosine, l2 };

template <class T>
struct Vectors {
  const T* data;
  int64_t stride, count, dim;
};
struct Queries {
  const float* data;
  int64_t stride, count;
};

// Higher is better: the inner product, the same over the length of the row, minus the squared
// distance. Queries of a cosine have been normalized.
inline float score_of(Metric metric, float dot, float row_square, float query_square) {
  if (metric == Metric::dot) return dot;
  if (metric == Metric::cosine) return row_square > 0 ? dot / std::sqrt(row_square) : 0;
  return 2 * dot - row_square - query_square;
}

inline float square_of(const float* x, int64_t dim) {
  double total = 0;
  for (int64_t i = 0; i < dim; ++i) total += double(x[i]) * double(x[i]);
  return float(total);
}

// Best k rows of each query by score, then by row.
template <class T, class Parallel>
std::vector<Collector> dense_search(const Queries& queries, const Vectors<T>& vectors, int64_t k,
                                    Metric metric, const Filter& filter, const Parallel& parallel) {
  constexpr int64_t kRows = 256, kQueries = 64;  // of the buffer of scores
  Collector start;
  start.k = k;
  std::vector<Collector> found(size_t(queries.count), start);
  std::vector<float> query_squares(size_t(queries.count));
  for (int64_t q = 0; q < queries.count; ++q) {
    query_squares[size_t(q)] = square_of(queries.data + q * queries.stride, vectors.dim);
  }
  std::mutex lock;
  const int64_t rows = filter.ids ? filter.id_count : vectors.count;
  parallel(rows, vectors.dim * int64_t(sizeof(T)) * queries.count,
           [&](int64_t first, int64_t last) {
             const auto& kernel = kernels<DotsKernels>().of(T{});
             std::vector<Collector> part(size_t(queries.count), start);
             std::vector<float> dots(size_t(kRows * kQueries)), squares(kRows);
             std::vector<int64_t> some(kRows);
             const bool shared = filter.bitmaps && filter.bitmap_stride == 0;
             while (first < last) {
               int64_t count = 0;
               for (; first < last && count < kRows; ++first) {
                 const int64_t row = filter.ids ? filter.ids[first] : first;
                 if (!shared || filter.allows(0, row)) some[size_t(count++)] = row;
               }
               DotsArgs<T> args{vectors.data, vectors.stride, some.data(), count,      vectors.dim,
                                nullptr,      queries.stride, 0,           dots.data()};
               if (metric != Metric::dot) kernel.squares(args, squares.data());
               for (int64_t begin = 0; begin < queries.count; begin += kQueries) {
                 args.queries = queries.data + begin * queries.stride;
                 args.query_count = std::min(kQueries, queries.count - begin);
                 kernel.dots(args);
                 for (int64_t i = 0; i < args.query_count; ++i) {
                   const int64_t q = begin + i;
                   Collector& list = part[size_t(q)];
                   for (int64_t r = 0; r < count; ++r) {
                     const float score = score_of(metric, dots[size_t(i * count + r)],
                                                  squares[size_t(r)], query_squares[size_t(q)]);
                     const uint64_t key = ScoreKey::of(score, some[size_t(r)]);
                     if (key >= list.limit || !filter.allows(q, some[size_t(r)])) continue;
                     list.add(key);
                   }
                 }
               }
             }
             const std::lock_guard<std::mutex> guard(lock);
             for (size_t q = 0; q < found.size(); ++q) found[q].merge(part[q]);
           });
  for (Collector& one : found) {
    one.tighten();
    std::sort(one.keys.begin(), one.keys.end());
  }
  return found;
}

// scores[q, i] of row ids[q, i]; -inf for id -1.
template <class T>
void gather_scores(const Queries& queries, const Vectors<T>& vectors, const int64_t* ids,
                   int64_t count, Metric metric, int64_t first, int64_t last, float* scores) {
  const auto& kernel = kernels<DotsKernels>().of(T{});
  std::vector<int64_t> rows(size_t(count), 0);
  std::vector<float> squares(size_t(count), 0.0f);
  for (int64_t q = first; q < last; ++q) {
    const float* query = queries.data + q * queries.stride;
    float* to = scores + q * count;
    int64_t wanted = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (ids[q * count + i] >= 0) rows[size_t(wanted++)] = ids[q * count + i];
    }
    const DotsArgs<T> args{vectors.data, vectors.stride, rows.data(), wanted, vectors.dim,
                           query,        queries.stride, 1,           to};
    kernel.dots(args);
    if (metric != Metric::dot) kernel.squares(args, squares.data());
    const float query_square = square_of(query, vectors.dim);
    for (int64_t i = count; i-- > 0;) {  // from the end: dots move to the right
      if (ids[q * count + i] < 0) {
        to[i] = -std::numeric_limits<float>::infinity();
      } else {
        --wanted;
        to[i] = score_of(metric, to[wanted], squares[size_t(wanted)], query_square);
      }
    }
  }
}

// Late interaction: score(Q, D) = sum over tokens i of Q of max over tokens j of D of <q_i, d_j>.
template <class T>
struct MaxSimArgs {
  const Accumulator<T>* queries;  // [tokens, dim]
  const int32_t* query_offsets;
  int64_t query_count, query_tokens, dim;
  const T* tokens;
  int64_t stride;
  const int32_t* offsets;
  int64_t count;           // documents
  Accumulator<T>* scores;  // [query_count, count]
  int32_t* argmax;         // [query_tokens, count] token of the batch, -1 if there is none; or null
};

// Eight maxima side by side, which compilers make a vector: one would wait for itself.
template <class A>
A largest_of(const A* x, int64_t count) {
  constexpr int64_t kLanes = 8;
  A lanes[kLanes];
  std::fill(lanes, lanes + kLanes, x[0]);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = x[j + i] > lanes[i] ? x[j + i] : lanes[i];
  }
  for (; j < count; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

// Documents [first, last). `dots_of(begin, end, out)` writes the products of tokens [begin, end)
// with all query tokens, [query_tokens, end - begin].
template <class A, class DotsOf>
void maxsim_documents(const int32_t* query_offsets, int64_t query_count, int64_t query_tokens,
                      const int32_t* offsets, int64_t count, int64_t first, int64_t last, A* scores,
                      int32_t* argmax, const DotsOf& dots_of) {
  constexpr int64_t kTokens = 256;
  std::vector<A> dots(size_t(kTokens * query_tokens)), best(static_cast<size_t>(query_tokens));
  std::vector<int32_t> where(static_cast<size_t>(query_tokens));
  for (int64_t n = first; n < last; ++n) {
    std::fill(where.begin(), where.end(), -1);
    std::fill(best.begin(), best.end(), A(0));  // no token: 0
    for (int64_t begin = offsets[n]; begin < offsets[n + 1]; begin += kTokens) {
      const int64_t tokens = std::min<int64_t>(kTokens, offsets[n + 1] - begin);
      dots_of(begin, begin + tokens, dots.data());
      for (int64_t i = 0; i < query_tokens; ++i) {
        const A* row = dots.data() + i * tokens;
        const A largest = largest_of(row, tokens);
        if (where[size_t(i)] >= 0 && !(largest > best[size_t(i)])) continue;
        best[size_t(i)] = largest;
        int64_t j = 0;
        while (argmax && j + 1 < tokens && row[j] != largest) ++j;
        where[size_t(i)] = int32_t(begin + j);
      }
    }
    for (int64_t b = 0; b < query_count; ++b) {
      A total = 0;
      for (int64_t i = query_offsets[b]; i < query_offsets[b + 1]; ++i) total += best[size_t(i)];
      scores[b * count + n] = total;
    }
    for (int64_t i = 0; argmax && i < query_tokens; ++i) argmax[i * count + n] = where[size_t(i)];
  }
}

template <class T>
void maxsim(const MaxSimArgs<T>& args, int64_t first, int64_t last) {
  const auto& kernel = kernels<DotsKernels>().of(T{});
  maxsim_documents(
      args.query_offsets, args.query_count, args.query_tokens, args.offsets, args.count, first,
      last, args.scores, args.argmax, [&](int64_t begin, int64_t end, Accumulator<T>* out) {
        kernel.dots({args.tokens + begin * args.stride, args.stride, nullptr, end - begin, args.dim,
                     args.queries, args.dim, args.query_tokens, out});
      });
}

}  // namespace emblas
