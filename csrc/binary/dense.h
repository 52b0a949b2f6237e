// Exact search, rescoring and late interaction over the kernels of dots.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#include "binary/dots.h"
#include "binary/maxsim.h"
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

// Queries as whole numbers of 16 bits, query ~ scale * values, whose products with int8 rows are
// exact in 32 bits. A product with the query itself, as the kernels compute it in float32, differs
// from scale * (whole product) by at most `error`.
class RoundedQueries {
 public:
  RoundedQueries(const Queries& queries, int64_t dim)
      : values_(size_t(queries.count * dim)), scales_(size_t(queries.count)), dim_(dim) {
    constexpr double kLargestRow = 128;
    const int64_t most = (int64_t(1) << 31) / int64_t(kLargestRow) / std::max<int64_t>(dim, 1) - 1;
    const double finest = double(std::clamp<int64_t>(most, 0, 32767));  // 0: only the error is left
    for (int64_t q = 0; q < queries.count; ++q) {
      const float* query = queries.data + q * queries.stride;
      double largest = 0, total = 0, lost = 0;
      for (int64_t i = 0; i < dim; ++i) {
        largest = std::max(largest, double(std::fabs(query[i])));
        total += double(std::fabs(query[i]));
      }
      Scale& scale = scales_[size_t(q)];
      scale.unit = largest > 0 && finest > 0 ? largest / finest : 0;
      for (int64_t i = 0; i < dim; ++i) {
        const double whole = scale.unit > 0 ? std::nearbyint(double(query[i]) / scale.unit) : 0;
        values_[size_t(q * dim + i)] = int16_t(whole);
        lost += std::fabs(double(query[i]) - scale.unit * whole);
      }
      // What float32 loses: half a unit in the last place at each addition, and margin.
      scale.error = kLargestRow * (lost + 0x1p-23 * double(dim + 8) * total);
      const double limit = double(std::numeric_limits<float>::max());
      if (!(kLargestRow * total < limit)) scale.error = std::numeric_limits<double>::infinity();
    }
  }

  const int16_t* at(int64_t q) const { return values_.data() + q * dim_; }
  // No product of query q that is this in whole numbers is above the result.
  float bound(int64_t q, int32_t whole) const {
    return float(scales_[size_t(q)].unit * double(whole) + scales_[size_t(q)].error);
  }

 private:
  struct Scale {
    double unit, error;
  };
  std::vector<int16_t> values_;
  std::vector<Scale> scales_;
  int64_t dim_;
};

// One thread's search of some of the rows.
template <class T>
class DensePass {
 public:
  DensePass(const Queries& queries, const Vectors<T>& vectors, Metric metric, const Filter& filter,
            const std::vector<float>& query_squares, const RoundedQueries* rounded,
            const Collector& start)
      : found(size_t(queries.count), start),
        queries_(queries),
        vectors_(vectors),
        metric_(metric),
        filter_(filter),
        query_squares_(query_squares),
        rounded_(rounded),
        dots_(size_t(kRows * kQueries)),
        squares_(kRows),
        best_dots_(kRows),
        rows_(kRows),
        best_rows_(kRows),
        best_(kRows) {
    if (rounded) whole_dots_.resize(size_t(kRows * kQueries));
  }

  // Rows [first, last) of the vectors, or of the list of ids.
  void run(int64_t first, int64_t last) {
    const bool shared = filter_.bitmaps && filter_.bitmap_stride == 0;
    while (first < last) {
      count_ = 0;
      for (; first < last && count_ < kRows; ++first) {
        const int64_t row = filter_.ids ? filter_.ids[first] : first;
        if (!shared || filter_.allows(0, row)) rows_[size_t(count_++)] = row;
      }
      DotsArgs<T> args{vectors_.data, vectors_.stride, rows_.data(),    count_,
                       vectors_.dim,  nullptr,         queries_.stride, 0,
                       nullptr};
      if (metric_ != Metric::dot) kernel().squares(args, squares_.data());
      for (int64_t begin = 0; begin < queries_.count; begin += kQueries) {
        const int64_t count = std::min(kQueries, queries_.count - begin);
        if (rounded_) {
          score_rounded(begin, count);
        } else {
          args.queries = queries_.data + begin * queries_.stride;
          args.query_count = count;
          args.dots = dots_.data();
          kernel().dots(args);
        }
        for (int64_t i = 0; i < count; ++i) collect(begin + i, dots_.data() + i * count_);
      }
    }
  }

  std::vector<Collector> found;

 private:
  static constexpr int64_t kRows = 256, kQueries = 64;  // of the buffer of scores

  // Upper bounds of the products.
  void score_rounded(int64_t begin, int64_t count) {
    if constexpr (std::is_same_v<T, int8_t>) {
      kernels<DotsKernels>().rounded_dots({vectors_.data, vectors_.stride, rows_.data(), count_,
                                           vectors_.dim, rounded_->at(begin), vectors_.dim, count,
                                           whole_dots_.data()});
      for (int64_t i = 0; i < count * count_; ++i) {
        dots_[size_t(i)] = rounded_->bound(begin + i / count_, whole_dots_[size_t(i)]);
      }
    }
  }

  // Adds the rows that are among the best of query q. Nearly none are, once the first were seen.
  void collect(int64_t q, const float* dots) {
    Collector& list = found[size_t(q)];
    const float query_square = query_squares_[size_t(q)];
    const auto score = [&](float dot, int64_t i) {
      return score_of(metric_, dot, squares_[size_t(i)], query_square);
    };
    const float worst = ScoreKey::distance(list.limit);  // NaN, until there are k
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      best_[size_t(kept)] = int32_t(i);
      kept += !(score(dots[i], i) < worst);
    }
    if (kept == 0) return;
    for (int64_t i = 0; i < kept; ++i) {
      best_rows_[size_t(i)] = rows_[size_t(best_[size_t(i)])];
      best_dots_[size_t(i)] = dots[best_[size_t(i)]];
    }
    if (rounded_) {
      kernel().dots({vectors_.data, vectors_.stride, best_rows_.data(), kept, vectors_.dim,
                     queries_.data + q * queries_.stride, queries_.stride, 1, best_dots_.data()});
    }
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t row = best_rows_[size_t(i)];
      const uint64_t key = ScoreKey::of(score(best_dots_[size_t(i)], best_[size_t(i)]), row);
      if (key < list.limit && filter_.allows(q, row)) list.add(key);
    }
  }

  static const Dots<T>& kernel() { return kernels<DotsKernels>().of(T{}); }

  const Queries& queries_;
  const Vectors<T>& vectors_;
  const Metric metric_;
  const Filter& filter_;
  const std::vector<float>& query_squares_;
  const RoundedQueries* rounded_;
  int64_t count_ = 0;                  // rows at a time
  std::vector<float> dots_, squares_;  // of [query, row]; of a row
  std::vector<float> best_dots_;       // of the rows that are kept for one query
  std::vector<int64_t> rows_, best_rows_;
  std::vector<int32_t> best_, whole_dots_;
};

// Best k rows of each query by score, then by row.
template <class T, class Parallel>
std::vector<Collector> dense_search(const Queries& queries, const Vectors<T>& vectors, int64_t k,
                                    Metric metric, const Filter& filter, const Parallel& parallel) {
  Collector start;
  start.k = k;
  std::vector<Collector> found(size_t(queries.count), start);
  std::vector<float> query_squares(size_t(queries.count));
  for (int64_t q = 0; q < queries.count; ++q) {
    query_squares[size_t(q)] = square_of(queries.data + q * queries.stride, vectors.dim);
  }
  std::optional<RoundedQueries> rounded;
  if (std::is_same_v<T, int8_t>) rounded.emplace(queries, vectors.dim);
  std::mutex lock;
  const int64_t rows = filter.ids ? filter.id_count : vectors.count;
  parallel(rows, vectors.dim * int64_t(sizeof(T)) * queries.count,
           [&](int64_t first, int64_t last) {
             DensePass<T> pass(queries, vectors, metric, filter, query_squares,
                               rounded ? &*rounded : nullptr, start);
             pass.run(first, last);
             const std::lock_guard<std::mutex> guard(lock);
             for (size_t q = 0; q < found.size(); ++q) found[q].merge(pass.found[q]);
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

// Late interaction of all queries with documents [first, last). best_of(begin, end, best, where)
// writes the largest product of tokens [begin, end) with each query token, and its first token
// counted from `begin` if `where` is not null.
template <class A, class BestOf>
void maxsim_documents(const int32_t* query_offsets, int64_t query_count, int64_t query_tokens,
                      const int32_t* offsets, int64_t count, int64_t first, int64_t last, A* scores,
                      int32_t* argmax, const BestOf& best_of) {
  std::vector<A> best(size_t(maxsim_padded(query_tokens)));
  std::vector<int32_t> where(argmax ? best.size() : 0);
  for (int64_t n = first; n < last; ++n) {
    const bool empty = offsets[n] == offsets[n + 1];
    if (empty) {
      std::fill(best.begin(), best.end(), A(0));
    } else {
      best_of(offsets[n], offsets[n + 1], best.data(), argmax ? where.data() : nullptr);
    }
    for (int64_t b = 0; b < query_count; ++b) {
      A total = 0;
      for (int64_t i = query_offsets[b]; i < query_offsets[b + 1]; ++i) total += best[size_t(i)];
      scores[b * count + n] = total;
    }
    for (int64_t i = 0; argmax && i < query_tokens; ++i) {
      argmax[i * count + n] = empty ? -1 : offsets[n] + where[size_t(i)];
    }
  }
}

template <class T>
struct MaxSimArgs {
  const Accumulator<T>* queries;  // [tokens, dim]
  const int32_t* query_offsets;
  int64_t query_count, query_tokens, dim;
  const T* tokens;  // floating-point, or uint8 codes
  int64_t stride;
  const int32_t* offsets;
  int64_t count;           // documents
  Accumulator<T>* scores;  // [query_count, count]
  int32_t* argmax;         // [query_tokens, count] token of the batch, -1 if there is none; or null
};

// Real-valued queries, packed once, with documents a range at a time.
template <class T>
class MaxSimQueries {
 public:
  using A = Accumulator<T>;

  explicit MaxSimQueries(const MaxSimArgs<T>& args)
      : args_(args),
        packed_(maxsim_padded(args.query_tokens) * kernel().packed(args.dim) * int64_t(sizeof(A))) {
    kernel().pack(args.queries, args.query_tokens, args.dim, packed());
  }

  void run(int64_t first, int64_t last) const {
    std::vector<A> buffer(size_t(maxsim_buffer(args_.dim)));
    maxsim_documents(
        args_.query_offsets, args_.query_count, args_.query_tokens, args_.offsets, args_.count,
        first, last, args_.scores, args_.argmax,
        [&](int64_t begin, int64_t end, A* best, int32_t* where) {
          kernel().best({args_.tokens + begin * args_.stride, args_.stride, end - begin, args_.dim,
                         packed(), args_.query_tokens, buffer.data(), best, where});
        });
  }

 private:
  static const MaxSim<T>& kernel() { return kernels<MaxSimKernels>().of(T{}); }
  A* packed() const { return reinterpret_cast<A*>(packed_.data()); }

  const MaxSimArgs<T>& args_;
  Tile packed_;
};

// Bits on both sides: the product of two codes is dim - 2 * distance.
class MaxSimCodes {
 public:
  MaxSimCodes(const Codes& queries, const Codes& tokens, int64_t dim)
      : queries_(queries), tokens_(tokens), dim_(dim) {
    if (!rearranged()) return;
    prepared_ = Tile(queries.count * width());
    for (int64_t q = 0; q < queries.count; ++q) {
      kernel().prepare_hamming(queries.at(q), queries.bytes, prepared_.data() + q * width());
    }
  }

  // Memory of one thread.
  Tile tile() const { return Tile(rearranged() ? capacity() * tokens_.bytes : 0); }

  void best(int64_t begin, int64_t end, Tile& tile, float* best, int32_t* where) const {
    if (where || !rearranged()) return best_of_rows(begin, end, best, where);
    std::vector<uint16_t> least(size_t(queries_.count), 0xffff);
    for (int64_t first = begin; first < end; first += capacity()) {
      const int64_t count = std::min(capacity(), end - first);
      kernel().interleave({tokens_.at(first), tokens_.stride, nullptr, count}, tokens_.bytes,
                          tile.data());
      kernel().nearest({tile.data(),
                        count,
                        tokens_.bytes,
                        prepared_.data(),
                        queries_.count,
                        nullptr,
                        nullptr,
                        {},
                        nullptr,
                        nullptr,
                        nullptr},
                       least.data());
    }
    for (int64_t q = 0; q < queries_.count; ++q) best[q] = product(least[size_t(q)]);
  }

 private:
  // Any width, and the place of the nearest token.
  void best_of_rows(int64_t begin, int64_t end, float* best, int32_t* where) const {
    struct Nearest {
      uint32_t distance = 0xffffffff;
      int32_t at = 0;
    };
    std::vector<uint64_t> words(size_t(row_words(tokens_.bytes)));
    for (int64_t q = 0; q < queries_.count; ++q) {
      if (tokens_.bytes > 0) std::memcpy(words.data(), queries_.at(q), size_t(tokens_.bytes));
      Nearest nearest;
      kernels<RowScanKernels>().scan_rows(
          {{tokens_.at(begin), tokens_.stride, nullptr, end - begin},
           tokens_.bytes,
           words.data(),
           0,
           &nearest.distance,
           &nearest,
           [](void* context, int64_t, int64_t position, uint32_t sum) {
             *static_cast<Nearest*>(context) = {sum, int32_t(position)};
           }});
      best[q] = product(nearest.distance);
      if (where) where[q] = nearest.at;
    }
  }

  float product(uint32_t distance) const { return float(dim_ - 2 * int64_t(distance)); }
  bool rearranged() const { return tokens_.bytes > 0 && tokens_.bytes <= kWidestScan; }
  int64_t width() const { return queries_.bytes * kernel().hamming_width; }
  int64_t capacity() const { return Tile::capacity(tokens_.bytes); }
  static const ScanKernels& kernel() { return kernels<ScanKernels>(); }

  Codes queries_, tokens_;
  int64_t dim_;
  Tile prepared_;
};

}  // namespace emblas
