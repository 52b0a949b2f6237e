// Disentangled scores (He et al., 2021, arXiv 2006.03654, section 3.1): a tile of queries against a
// block of keys, forward and backward.
//
// A block of n keys and m queries has n + m - 1 distances, which fall into at most as many runs.
// Only their position vectors are multiplied, C[run][query] = PK Qt and D[run][key] = PQ Kt; then
// each pair looks up its two numbers. Backward adds the pairs of a run first, and multiplies the
// sums. So nothing is as large as (tokens, runs), and far from the diagonal, where one run holds
// all, the cost vanishes.
#pragma once

#include "attention/score_cpu.h"

namespace emblas {
namespace {

// Accumulators that the biases of a tile need for a block of keys, of which this many are columns.
constexpr int64_t kColumnScratch = 2 * kKeyBlock * kKeyBlock;
constexpr int64_t bias_scratch(int64_t head_dim) { return kColumnScratch + kKeyBlock * head_dim; }

// The runs of the distances in a block, as columns 0 to count.
template <class A, int vectors>
struct RunsOfBlock {
  static constexpr int64_t width = vectors * kLanes<A>;
  static_assert(width <= kKeyBlock);  // so that scratch holds all columns

  int32_t column[kKeyBlock + width];  // key j and query i: at origin - j + i
  const int64_t origin;
  int64_t first, count;

  RunsOfBlock(const Place<A>& place, int64_t first_key, int64_t keys) : origin(keys - 1) {
    const auto& positions = place.args.positions;
    const int64_t last = first_key + origin - place.position;
    const int64_t lowest = last - (origin + place.count - 1);
    first = positions.run_of(lowest);
    count = positions.run_of(last) - first + 1;
    for (int64_t e = 0; e < origin + width; ++e) {
      // Lanes beyond the last query repeat a distance of it.
      column[e] = int32_t(positions.run_of(larger(last - e, lowest)) - first);
    }
  }
  const int32_t* of_key(int64_t j) const { return column + origin - j; }
};

// to[r][0..width) = rows[r] . x[0..depth)[0..width) for all r < count; x and `to` to_stride apart.
template <int vectors, class A>
void multiply_rows(Rows<const A> rows_of, int64_t count, int64_t depth, const A* x, int64_t stride,
                   A* to) {
  for_rows(count, [&]<int rows>(Constant<rows>, int64_t row) {
    Vector<A> s[rows][vectors] = {};
    multiply_add(s, rows_of.data + row * rows_of.stride, rows_of.stride, 1, x, stride, depth);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < vectors; ++c) store(to + (row + r) * stride + c * kLanes<A>, s[r][c]);
    }
  });
}

// to[r][j] = rows[r] . x[j] factor, r < count, j < keys <= kKeyBlock; to [count][kKeyBlock].
template <class A>
[[gnu::noinline]] void multiply_keys(Rows<const A> rows, int64_t count, int64_t depth,
                                     Rows<const A> x, int64_t keys, A factor, A* to, A* scratch) {
  constexpr int64_t lanes = kLanes<A>;
  read_transposed<int(kKeyBlock / lanes)>(x.data, x.stride, keys, depth, factor, scratch);
  for (int64_t j = 0; j < keys; j += 2 * lanes) {
    multiply_rows<2>(rows, count, depth, scratch + j, kKeyBlock, to + j);
  }
}

// The position vectors of a head's runs from `first` on.
template <class A>
Rows<const A> vectors_of(const PositionVectors<A>& positions, const A* all, int64_t head,
                         int64_t first) {
  return {all + (head * positions.runs + first) * positions.stride, positions.stride};
}

// scores += the disentangled scores; qt and scale as in the scores themselves.
template <class A, int vectors>
[[gnu::noinline]] void add_position_scores(const Place<A>& place, int64_t first, int64_t keys,
                                           const A* qt, Rows<const A> k, int64_t head_dim, A scale,
                                           A* scores, A* scratch) {
  constexpr int64_t width = vectors * kLanes<A>;
  const auto& positions = place.args.positions;
  const RunsOfBlock<A, vectors> runs(place, first, keys);
  if (positions.keys) {
    multiply_rows<vectors>(vectors_of(positions, positions.keys, place.group, runs.first),
                           runs.count, head_dim, qt, width, scratch);
    for (int64_t j = 0; j < keys; ++j) {
      const int32_t* const column = runs.of_key(j);
      A* const to = scores + j * width;
      for (int64_t i = 0; i < width; ++i) to[i] += scratch[column[i] * width + i];
    }
  }
  if (positions.queries) {
    multiply_keys(vectors_of(positions, positions.queries, place.head, runs.first), runs.count,
                  head_dim, k, keys, scale * A(kLog2E), scratch, scratch + kColumnScratch);
    for (int64_t j = 0; j < keys; ++j) {
      const int32_t* const column = runs.of_key(j);
      const A* const from = scratch + j;
      A* const to = scores + j * width;
      for (int64_t i = 0; i < width; ++i) to[i] += from[column[i] * kKeyBlock];
    }
  }
}

// What ds (times the scale) gives to the rows of dq and dk, and to the sums of the sequence's runs
// (null: unwanted).
template <class A, int vectors>
[[gnu::noinline]] void add_position_gradients(const Place<A>& place, int64_t first, int64_t keys,
                                              const A* ds, Rows<const A> q, Rows<const A> k,
                                              int64_t head_dim, Rows<A> dq, Rows<A> dk, A* key_sums,
                                              A* query_sums, A* scratch) {
  constexpr int64_t width = vectors * kLanes<A>;
  const auto& positions = place.args.positions;
  const RunsOfBlock<A, vectors> runs(place, first, keys);
  const int64_t row = runs.first - positions.run_of(1 - place.length);
  const auto sums_of = [&](A* sums) -> Rows<A> {
    return {sums + row * positions.stride, positions.stride};
  };
  // total[run stride_of_run + ...] += ds_ij over the pairs of a run.
  const auto fold = [&](int64_t run_stride, int64_t key_stride, int64_t query_stride) {
    for (int64_t i = 0; i < runs.count * run_stride; ++i) scratch[i] = 0;
    for (int64_t j = 0; j < keys; ++j) {
      const int32_t* const column = runs.of_key(j);
      A* const to = scratch + j * key_stride;
      for (int64_t i = 0; i < place.count; ++i) {
        to[column[i] * run_stride + i * query_stride] += ds[j * width + i];
      }
    }
  };
  if (positions.keys) {
    fold(width, 0, 1);
    add_outer(dq, place.count, head_dim, scratch, 1, width,
              vectors_of(positions, positions.keys, place.group, runs.first), runs.count);
    if (key_sums) {
      add_outer(sums_of(key_sums), runs.count, head_dim, scratch, width, 1, q, place.count);
    }
  }
  if (positions.queries) {
    fold(kKeyBlock, 1, 0);
    add_outer(dk, keys, head_dim, scratch, 1, kKeyBlock,
              vectors_of(positions, positions.queries, place.head, runs.first), runs.count);
    if (query_sums) {
      add_outer(sums_of(query_sums), runs.count, head_dim, scratch, kKeyBlock, 1, k, keys);
    }
  }
}

}  // namespace
}  // namespace emblas
