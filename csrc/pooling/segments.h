// Where the rows of a segment are: what every pooling kernel reads its tokens through.
//
// Segment b owns the positions [begins[b] + skip[b], ends[b]). A position is a row of x or, with an
// index, an entry of the index. x is one plane of rows, or (padded batches) several planes of
// `plane_rows` rows each, any strides apart.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// The values are part of the operator's schema.
enum class PoolMode : int64_t { mean, sum, mean_sqrt_len, weighted_mean, cls, last };
inline constexpr int64_t kPoolModes = 6;

template <class T>
struct Segments {
  const T* x;
  int64_t dim;
  int64_t row_stride;
  int64_t plane_rows;  // 0: all rows are in one plane
  int64_t plane_stride;
  const int32_t* begins;          // [batch]
  const int32_t* ends;            // [batch]; may be begins + 1
  const int32_t* skip;            // [batch] or null
  const int32_t* index;           // rows by position, or null
  const Accumulator<T>* weights;  // by position, or null; rows of weight 0 are not read
};

namespace {

struct Range {
  int64_t begin, end;
  int64_t origin;  // where positions are counted from: the skipped prefix counts
};

template <class T>
inline Range range_of(const Segments<T>& segments, int64_t b, PoolMode mode) {
  Range range{segments.begins[b], segments.ends[b], segments.begins[b]};
  if (segments.skip) {
    range.begin += segments.skip[b];
    if (range.begin > range.end) range.begin = range.end;
  }
  const auto absent = [&](int64_t p) { return segments.weights && segments.weights[p] == 0; };
  if (mode == PoolMode::cls) {
    while (range.begin < range.end && absent(range.begin)) ++range.begin;
    if (range.begin < range.end) range.end = range.begin + 1;
  } else if (mode == PoolMode::last) {
    while (range.begin < range.end && absent(range.end - 1)) --range.end;
    if (range.begin < range.end) range.begin = range.end - 1;
  }
  return range;
}

inline bool takes_one_token(PoolMode mode) {
  return mode == PoolMode::cls || mode == PoolMode::last;
}

template <class T>
inline Accumulator<T> weight_at(const Segments<T>& segments, const Range& range, int64_t p,
                                PoolMode mode) {
  using A = Accumulator<T>;
  if (takes_one_token(mode)) return 1;  // weights only say which tokens there are
  const A weight = segments.weights ? segments.weights[p] : A(1);
  return mode == PoolMode::weighted_mean ? weight * A(p - range.origin + 1) : weight;
}

template <class T>
inline const T* row_at(const Segments<T>& segments, int64_t p) {
  const int64_t row = segments.index ? segments.index[p] : p;
  if (segments.plane_rows == 0) return segments.x + row * segments.row_stride;
  return segments.x + row / segments.plane_rows * segments.plane_stride +
         row % segments.plane_rows * segments.row_stride;
}

}  // namespace
}  // namespace emblas
