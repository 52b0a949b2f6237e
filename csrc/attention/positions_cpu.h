// Disentangled scores (He et al., 2021, arXiv 2006.03654, section 3.1): a tile of queries against a
// block of keys, forward and backward.
//
// A block of n keys and m queries has n + m - 1 distances, which fall into at most as many runs.
// Their position vectors are multiplied, C[query][run] = Q PKt and D[key][run] = K PQt, and the
// numbers of neighbouring pairs are those of neighbouring distances in a row of C or D. Backward
// lays the pairs of a query, or key, side by side by distance, and multiplies that. Far from the
// diagonal, where a block has few runs, each pair selects its number instead, and the pairs of a
// run are added up first. So nothing is as large as (tokens, runs).
//
// Near the diagonal there are up to twice as many multiply-adds as for q . k, for either kind of
// vectors; far from it the cost vanishes.
#pragma once

#include "attention/score_cpu.h"

namespace emblas {
namespace {

// Accumulators that the biases of a tile need for a block of keys: numbers of keys, or queries, by
// distance, and vectors of distances twice.
constexpr int64_t bias_scratch(int64_t head_dim) {
  return 2 * kKeyBlock * (kKeyBlock + 2 * head_dim);
}

// The position vectors of a block of keys.
template <class A, int vectors>
class Positions {
 public:
  static constexpr int64_t lanes = kLanes<A>, width = vectors * lanes;

  Positions(const Place<A>& place, int64_t first_key, int64_t keys, int64_t head_dim, A* scratch)
      : place_(place),
        positions_(place.args.positions),
        keys_(keys),
        head_dim_(head_dim),
        distances_(keys + width - 1),
        numbers_(scratch),
        vectors_(numbers_ + 2 * kKeyBlock * kKeyBlock),
        others_(vectors_ + 2 * kKeyBlock * round_up(head_dim, lanes)) {
    // Lanes beyond the last query have no distances of their own.
    const int64_t lowest = first_key - place.position - (width - 1), absent = width - place.count;
    first_run_ = positions_.run_of(lowest + absent);
    for (int64_t number = 0; number < distances_; ++number) {
      const int64_t run = positions_.run_of(lowest + larger(number, absent)) - first_run_;
      rising_[number] = falling_[distances_ - 1 - number] = Int(run);
    }
    runs_ = rising_[distances_ - 1] + 1;
  }

  // scores += the disentangled scores; qt and scale as in the scores themselves.
  void add_scores(const A* qt, Rows<const A> k, A scale, A* scores) {
    if (positions_.keys) add_key_scores(qt, scores);
    if (positions_.queries) add_query_scores(k, scale * A(kLog2E), scores);
  }

  // What ds (times the scale) gives to the rows of dq and dk, and to the sums of the sequence's
  // runs (null: unwanted).
  void add_gradients(const A* ds, Rows<const A> q, Rows<const A> k, Rows<A> dq, Rows<A> dk,
                     A* key_sums, A* query_sums) {
    if (positions_.keys) add_key_gradients(ds, q, dq, key_sums);
    if (positions_.queries) add_query_gradients(ds, k, dk, query_sums);
  }

 private:
  using V = Vector<A>;
  using Index = decltype(V{} < V{});
  using Int = std::remove_reference_t<decltype(Index{}[0])>;
  static constexpr int64_t stride = kKeyBlock + width;  // of rows of distances
  static_assert(width <= kKeyBlock);                    // so that scratch is large enough

  // Few enough that selecting one of them takes less than multiplying every distance.
  bool few_runs() const { return runs_ <= 16; }

  void add_key_scores(const A* qt, A* scores) {
    const Rows<const A> rows = vectors_of(positions_.keys, place_.group);
    if (few_runs()) {
      set_outer({numbers_, width}, runs_, width, rows.data, rows.stride, 1, {qt, width}, head_dim_);
      return select(scores, [&](int64_t run, int64_t, int64_t i) {
        return load(numbers_ + run * width + i);
      });
    }
    multiply_runs(rows, A(1), qt, 1, width, place_.count);
    for (int64_t j = 0; j < keys_; j += lanes) {
      for (int64_t i = 0; i < place_.count; i += lanes) {
        V x[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t query = smaller(i + lane, place_.count - 1);
          x[lane] = along<0>(numbers_ + query * stride, rising_ + number_of(query, j));
        }
        transpose(x);
#pragma GCC unroll 64
        for (int lane = 0; lane < lanes; ++lane) {
          A* const to = scores + (j + lane) * width + i;
          store(to, load(to) + x[lane]);
        }
      }
    }
  }

  void add_query_scores(Rows<const A> k, A factor, A* scores) {
    const Rows<const A> rows = vectors_of(positions_.queries, place_.head);
    if (few_runs()) {
      read_transposed<int(kKeyBlock / lanes)>(k.data, k.stride, keys_, head_dim_, factor, others_);
      set_outer({numbers_, kKeyBlock}, runs_, keys_, rows.data, rows.stride, 1,
                {others_, kKeyBlock}, head_dim_);
      return select(scores, [&](int64_t run, int64_t j, int64_t) {
        return broadcast<V>(numbers_[run * kKeyBlock + j]);
      });
    }
    multiply_runs(rows, factor, k.data, k.stride, 1, keys_);
    for (int64_t j = 0; j < keys_; ++j) {
      for (int64_t i = 0; i < width; i += lanes) {
        A* const to = scores + j * width + i;
        store(to, load(to) + along<lanes - 1>(numbers_ + j * stride, falling_runs(j, i)));
      }
    }
  }

  void add_key_gradients(const A* ds, Rows<const A> q, Rows<A> dq, A* sums) {
    const Rows<const A> rows = vectors_of(positions_.keys, place_.group);
    if (few_runs()) {
      for (int64_t run = 0; run < runs_; ++run) {
        for (int64_t i = 0; i < width; i += lanes) {
          V total{};
          for (int64_t j = 0; j < keys_; ++j) {
            total += has_run(j, i, run) ? load(ds + j * width + i) : V{};
          }
          store(numbers_ + run * width + i, total);
        }
      }
      add_outer(dq, place_.count, head_dim_, numbers_, 1, width, rows, runs_);
      return add_sums(sums, runs_, width, 1, q, place_.count);
    }
    clear_numbers(place_.count);
    // A row shorter by one, so that a pair's distance is its place.
    write_transposed<vectors>(ds, place_.count, keys_, numbers_ + number_of(0, 0), stride - 1);
    add_outer(dq, place_.count, head_dim_, numbers_, stride, 1, by_distance(rows), distances_);
    add_sums(sums, distances_, 1, stride, q, place_.count);
  }

  void add_query_gradients(const A* ds, Rows<const A> k, Rows<A> dk, A* sums) {
    const Rows<const A> rows = vectors_of(positions_.queries, place_.head);
    const auto load_queries = [&](int64_t j, int64_t i) {
      return load_part(ds + j * width + i, larger(0, place_.count - i));
    };
    if (few_runs()) {
      for (int64_t run = 0; run < runs_; ++run) {
        for (int64_t j = 0; j < keys_; ++j) {
          V total{};
          for (int64_t i = 0; i < width; i += lanes) {
            total += has_run(j, i, run) ? load_queries(j, i) : V{};
          }
          numbers_[run * kKeyBlock + j] = sum(total);
        }
      }
      add_outer(dk, keys_, head_dim_, numbers_, 1, kKeyBlock, rows, runs_);
      return add_sums(sums, runs_, kKeyBlock, 1, k, keys_);
    }
    clear_numbers(keys_);
    for (int64_t j = 0; j < keys_; ++j) {
      for (int64_t i = 0; i < width; i += lanes) {
        store(numbers_ + j * stride + number_of(i + lanes - 1, j), reversed(load_queries(j, i)));
      }
    }
    add_outer(dk, keys_, head_dim_, numbers_, stride, 1, by_distance(rows), distances_);
    add_sums(sums, distances_, 1, stride, k, keys_);
  }

  // Of the pair's distance; they rise from 0.
  static int64_t number_of(int64_t query, int64_t key) { return width - 1 - query + key; }
  // The runs of key j with the queries from i on.
  const Int* falling_runs(int64_t j, int64_t i) const { return falling_ + keys_ - 1 - j + i; }
  Index has_run(int64_t j, int64_t i, int64_t run) const {
    return load_runs(falling_runs(j, i)) == Index{} + Int(run);
  }
  static Index load_runs(const Int* from) {
    Index runs;
    std::memcpy(&runs, from, sizeof runs);
    return runs;
  }

  // A head's, from the block's first run on.
  Rows<const A> vectors_of(const A* all, int64_t head) const {
    return {all + (head * positions_.runs + first_run_) * positions_.stride, positions_.stride};
  }
  // One for each distance.
  Rows<const A> by_distance(Rows<const A> rows) {
    if (runs_ == distances_) return rows;
    const int64_t size = round_up(head_dim_, lanes);
    for (int64_t number = 0; number < distances_; ++number) {
      const A* const from = rows.from(rising_[number]).data;
      for (int64_t c = 0; c < size; c += lanes) store(vectors_ + number * size + c, load(from + c));
    }
    return {vectors_, size};
  }

  // numbers_[r][run] = factor x[r] . vector, r < count; element c of x[r] is x[r row + c step].
  void multiply_runs(Rows<const A> rows, A factor, const A* x, int64_t row, int64_t step,
                     int64_t count) {
    for (int64_t run = 0; run < runs_; run += lanes) {
      for_transposed<1>(rows.from(run).data, rows.stride, runs_ - run, head_dim_,
                        [&](auto& y, int64_t c, int64_t) {
#pragma GCC unroll 64
                          for (int lane = 0; lane < lanes; ++lane) {
                            store(others_ + (c + lane) * stride + run, factor * y[lane]);
                          }
                        });
    }
    set_outer({numbers_, stride}, count, runs_, x, row, step, {others_, stride}, head_dim_);
  }
  // The numbers of neighbouring distances, whose runs are given, the lowest in lane `first`.
  template <int64_t first>
  static V along(const A* row, const Int* given) {
    const Index runs = load_runs(given);
    return permute(load(row + runs[first]), runs - runs[first]);
  }

  void clear_numbers(int64_t rows) {
    for (int64_t i = 0; i < rows * stride; i += lanes) store(numbers_ + i, V{});
  }

  // scores += number(run, key, query) of the run of each pair.
  template <class Number>
  void select(A* scores, const Number& number) const {
    for (int64_t i = 0; i < width; i += lanes) {
      for (int64_t j = 0; j < keys_; ++j) {
        V x = number(0, j, i);
        for (int64_t run = 1; run < runs_; ++run) x = has_run(j, i, run) ? number(run, j, i) : x;
        A* const to = scores + j * width + i;
        store(to, load(to) + x);
      }
    }
  }

  // sums[run] += sum_i numbers_[n row + i step] x[i], n < count_rows being a run or a distance.
  void add_sums(A* sums, int64_t count_rows, int64_t row, int64_t step, Rows<const A> x,
                int64_t count) {
    if (!sums) return;
    const int64_t first = first_run_ - positions_.run_of(1 - place_.length);
    const Rows<A> to{sums + first * positions_.stride, positions_.stride};
    if (count_rows == runs_) {
      return add_outer(to, runs_, head_dim_, numbers_, row, step, x, count);
    }
    const int64_t size = round_up(head_dim_, lanes);
    set_outer({others_, size}, count_rows, head_dim_, numbers_, row, step, x, count);
    for (int64_t number = 0; number < count_rows; ++number) {
      A* const total = to.from(rising_[number]).data;
      for (int64_t c = 0; c < size; c += lanes) {
        store(total + c, load(total + c) + load(others_ + number * size + c));
      }
    }
  }

  const Place<A>& place_;
  const PositionVectors<A>& positions_;
  const int64_t keys_, head_dim_, distances_;
  A *const numbers_, *const vectors_, *const others_;
  int64_t first_run_, runs_;
  Int rising_[stride] = {}, falling_[stride] = {};  // runs by rising and by falling distance
};

}  // namespace
}  // namespace emblas
