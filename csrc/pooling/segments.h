// Where the rows of a segment are: what every pooling kernel reads its tokens through.
//
// Segment b owns the positions [begins[b] + skip[b], ends[b]). A position is a row of x or, with an
// index, an entry of the index. x is one plane of rows, or (padded batches) several planes of
// `plane_rows` rows each, any strides apart.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// The values are part of the operators' schemas. Linear modes come first.
enum class PoolMode : int64_t { mean, sum, mean_sqrt_len, weighted_mean, cls, last, max };
inline constexpr int64_t kLinearModes = 6, kPoolModes = 7;

// Several at once, each at most once.
struct PoolModes {
  PoolMode at[kPoolModes];
  int64_t count;
};

// What a token gets in a gradient of one segment in one mode: `factor` times row `number` of what
// segments contribute, in max those values of it whose maximum is at the token's position.
template <class A>
struct RowShare {
  int64_t number;  // segment * modes + mode
  A factor;
  const int32_t* argmax;  // [dim] or null
  int32_t position;
};

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
// In the others weights only say which tokens there are.
inline bool weighs(PoolMode mode) { return mode < PoolMode::cls; }

// The positions of a segment that any of the modes looks at.
template <class T>
inline Range range_of(const Segments<T>& segments, int64_t b, const PoolModes& modes) {
  return range_of(segments, b, modes.count == 1 ? modes.at[0] : PoolMode::mean);
}

// Derivative of the weight of a position by the caller's weight, where those weigh.
template <class A>
inline A steps_at(const Range& range, int64_t p, PoolMode mode) {
  return mode == PoolMode::weighted_mean ? A(p - range.origin + 1) : A(1);
}

template <class T>
inline Accumulator<T> weight_at(const Segments<T>& segments, const Range& range, int64_t p,
                                PoolMode mode) {
  using A = Accumulator<T>;
  if (takes_one_token(mode)) return 1;  // its range holds that token
  const A weight = segments.weights ? segments.weights[p] : A(1);
  if (mode == PoolMode::max) return weight == 0 ? A(0) : A(1);
  return weight * steps_at<A>(range, p, mode);
}

// visit(share) of position p for each mode that pools it; `ranges` by mode, `number` of the first.
template <class T, class Visit>
inline void for_shares(const Segments<T>& segments, const PoolModes& modes, const Range* ranges,
                       int64_t number, const int32_t* argmax, int64_t p, const Visit& visit) {
  using A = Accumulator<T>;
  for (int64_t m = 0; m < modes.count; ++m) {
    if (p < ranges[m].begin || p >= ranges[m].end) continue;
    const A weight = weight_at(segments, ranges[m], p, modes.at[m]);
    if (weight == 0) continue;
    const bool max = modes.at[m] == PoolMode::max;
    visit(RowShare<A>{number + m, weight, max ? argmax : nullptr, int32_t(p)});
  }
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
