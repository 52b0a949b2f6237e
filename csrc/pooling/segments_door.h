// The door of all pooling operators over segments: guards, work split, sums over shared tokens.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "common/aligned.h"
#include "common/packed.h"
#include "common/tensor.h"
#include "pooling/segments.h"

namespace emblas {

inline constexpr char kPoolingDtypes[] = "x must be float32, float64, bfloat16 or float16";

inline int64_t rows_of(const Tensor& x) { return x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0); }
inline int64_t dim_of(const Tensor& x) { return x.size(x.dim() - 1); }

// The modes of an operator of several.
inline PoolModes modes_of(const std::vector<int64_t>& modes) {
  PoolModes out{{}, int64_t(modes.size())};
  bool valid = 1 <= out.count && out.count <= kPoolModes;
  for (int64_t m = 0; valid && m < out.count; ++m) {
    valid = 0 <= modes[m] && modes[m] < kPoolModes;
    out.at[m] = PoolMode(modes[m]);
    for (int64_t before = 0; before < m; ++before) valid &= modes[before] != modes[m];
  }
  check(valid, "modes must hold numbers of pooling modes, each once");
  return out;
}
inline bool has_mode(const PoolModes& modes, PoolMode mode) {
  const PoolMode* end = modes.at + modes.count;
  return std::find(modes.at, end, mode) != end;
}

// A gradient of the shape of x.
inline Tensor empty_like_tokens(const Tensor& x, bool needed) {
  if (!needed) return empty_cpu<1>(x.scalar_type(), {0});
  if (x.dim() == 3) return empty_cpu<3>(x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  return empty_cpu<2>(x.scalar_type(), {x.size(0), x.size(1)});
}

// The tensors that say where segments are: offsets (batch + 1) or, with `ends`, starts (batch).
struct SegmentTensors {
  const Tensor& x;
  const Tensor& starts;
  const std::optional<Tensor>& weights;
  const std::optional<Tensor>& ends;
  const std::optional<Tensor>& skip;
  const std::optional<Tensor>& index;

  int64_t batch() const { return ends ? ends->size(0) : starts.size(0) - 1; }
  int64_t positions() const { return index ? index->size(0) : rows_of(x); }
  const int32_t* begin_values() const { return read<int32_t>(starts); }
  const int32_t* end_values() const { return ends ? read<int32_t>(*ends) : begin_values() + 1; }

  void check_all() const {
    check(x.is_cpu() && (x.dim() == 2 || x.dim() == 3) &&
              (dim_of(x) <= 1 || x.stride(x.dim() - 1) == 1 || x.numel() == 0),
          "x must be a CPU tensor (tokens, dim) or (batch, length, dim) with a contiguous last "
          "dimension");
    check(rows_of(x) <= INT32_MAX, "x must have less than 2^31 tokens");
    check_index();
    check_offsets();
    if (!weights) return;
    const char* message =
        "weights must be a contiguous CPU vector of one weight per token, float64 where x is "
        "float64 and float32 otherwise";
    if (has_dtype<double>(x)) {
      check_weights<double>(message);
    } else {
      check_weights<float>(message);
    }
  }

  template <class T>
  Segments<T> view() const {
    Segments<T> out{};
    out.x = read<T>(x);
    out.dim = dim_of(x);
    out.row_stride = x.stride(x.dim() - 2);
    if (x.dim() == 3 && x.stride(0) != x.size(1) * x.stride(1)) {
      out.plane_rows = x.size(1);
      out.plane_stride = x.stride(0);
    }
    out.begins = begin_values();
    out.ends = end_values();
    out.skip = skip ? read<int32_t>(*skip) : nullptr;
    out.index = index ? read<int32_t>(*index) : nullptr;
    out.weights = weights ? read<Accumulator<T>>(*weights) : nullptr;
    return out;
  }

  // In rising order and without a position in common: every row belongs to one segment at most.
  bool disjoint() const {
    if (index) return false;
    const int32_t *begins = begin_values(), *last = end_values();
    for (int64_t b = 1; b < batch(); ++b) {
      if (begins[b] < last[b - 1]) return false;
    }
    return true;
  }

 private:
  template <class A>
  void check_weights(const char* message) const {
    check_vector<A>(*weights, positions(), message);
    const A* weight = read<A>(*weights);
    bool valid = true;
    for (int64_t p = 0; p < positions(); ++p) valid &= weight[p] == weight[p];
    check(valid, "weights must not hold NaN");
  }

  void check_index() const {
    if (!index) return;
    check_vector<int32_t>(*index, -1, "index must be a contiguous int32 CPU vector");
    const int64_t rows = rows_of(x);
    const int32_t* row = read<int32_t>(*index);
    bool valid = true;
    for (int64_t p = 0; p < index->size(0); ++p) valid &= row[p] >= 0 && row[p] < rows;
    check(valid, "index must hold rows of x, 0 to the number of tokens - 1");
  }

  void check_offsets() const {
    if (!ends) {
      check_vector<int32_t>(starts, -1, "cu_seqlens must be a contiguous int32 CPU vector");
      check(starts.size(0) >= 1, "cu_seqlens must have at least one element");
      check(valid_cu_seqlens(begin_values(), batch(), positions()),
            "cu_seqlens must start at 0, never decrease and end at the number of tokens");
    } else {
      const char* message = "starts and ends must be contiguous int32 CPU vectors of one size";
      check_vector<int32_t>(*ends, -1, message);
      check_vector<int32_t>(starts, batch(), message);
      bool valid = true;
      for (int64_t b = 0; b < batch(); ++b) {
        const int32_t begin = begin_values()[b], end = end_values()[b];
        valid &= 0 <= begin && begin <= end && end <= positions();
      }
      check(valid, "starts and ends must hold 0 <= start <= end <= number of tokens");
    }
    if (!skip) return;
    check_vector<int32_t>(*skip, batch(),
                          "skip_prefix must be a contiguous int32 CPU vector of one count per "
                          "segment");
    bool valid = true;
    for (int64_t b = 0; b < batch(); ++b) valid &= read<int32_t>(*skip)[b] >= 0;
    check(valid, "skip_prefix must not be negative");
  }
};

// body(first, last, scratch) over the segments, in tasks of about equal numbers of positions;
// scratch holds scratch_rows * dim accumulators.
template <class A, class Body>
void for_segments(const SegmentTensors& tensors, int64_t scratch_rows, const Body& body) {
  const int64_t batch = tensors.batch(), dim = dim_of(tensors.x);
  std::vector<int64_t> cost(batch + 1);  // positions before a segment, and one for itself
  for (int64_t b = 0; b < batch; ++b) {
    cost[b + 1] = cost[b] + 1 + tensors.end_values()[b] - tensors.begin_values()[b];
  }
  const auto segment_from = [&](int64_t position) {
    return std::lower_bound(cost.begin(), cost.end() - 1, position) - cost.begin();
  };
  parallel_for(cost[batch], dim * int64_t(sizeof(A)), [&](int64_t low, int64_t high) {
    const AlignedArray<A> scratch = aligned_array<A>(scratch_rows * dim);
    body(segment_from(low), segment_from(high), scratch.get());
  });
}

// What segments give each row, for gradients where segments share tokens.
//
// Each row's segments come in one fixed order. For spans it is by range and then by the bits of
// what the segment contributes, so the sums have the same bits in whatever order spans are given.
template <class T>
class SharedRows {
 public:
  using A = Accumulator<T>;
  // shared: [batch, modes, dim], what each segment contributes; argmax: [batch, dim] or null
  SharedRows(const SegmentTensors& tensors, const PoolModes& modes, const A* shared,
             const int32_t* argmax)
      : view_(tensors.view<T>()),
        modes_(modes),
        argmax_(argmax),
        rows_(rows_of(tensors.x)),
        batch_(tensors.batch()) {
    for (int64_t b = 0; b < batch_; ++b) {
      ranges_.push_back(range_of(view_, b, modes));
      for (int64_t m = 0; m < modes.count; ++m) {
        mode_ranges_.push_back(range_of(view_, b, modes.at[m]));
      }
    }
    view_.index ? by_index(tensors.positions()) : by_span(shared);
  }

  // visit(row, shares, count) for every row, in parallel tasks; make() gives each task its own
  // visitor.
  template <class Make>
  void for_rows(const Make& make) const {
    parallel_for(rows_, view_.dim * int64_t(sizeof(A)), [&](int64_t low, int64_t high) {
      auto visit = make();
      std::vector<RowShare<A>> shares;
      if (view_.index) {
        for (int64_t row = low; row < high; ++row) {
          shares.clear();
          for (int64_t i = first_[row]; i < first_[row + 1]; ++i) {
            const int32_t p = order_[i];
            add(segment_[p], p, shares);
          }
          visit(row, shares.data(), int64_t(shares.size()));
        }
        return;
      }
      std::vector<int32_t> open;  // segments over the row, in order
      size_t next = 0;
      for (int64_t row = low; row < high; ++row) {
        std::erase_if(open, [&](int32_t b) { return ranges_[b].end <= row; });
        for (; next < order_.size() && ranges_[order_[next]].begin <= row; ++next) {
          if (ranges_[order_[next]].end > row) open.push_back(order_[next]);
        }
        shares.clear();
        for (int32_t b : open) add(b, row, shares);
        visit(row, shares.data(), int64_t(shares.size()));
      }
    });
  }

 private:
  void add(int32_t b, int64_t p, std::vector<RowShare<A>>& shares) const {
    const int64_t first = b * modes_.count;
    const int32_t* argmax = argmax_ ? argmax_ + b * view_.dim : nullptr;
    for_shares(view_, modes_, &mode_ranges_[first], first, argmax, p,
               [&](const RowShare<A>& share) { shares.push_back(share); });
  }

  void by_index(int64_t positions) {
    segment_.assign(positions, -1);
    first_.assign(rows_ + 1, 0);
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t p = ranges_[b].begin; p < ranges_[b].end; ++p) {
        segment_[p] = int32_t(b);
        ++first_[view_.index[p] + 1];
      }
    }
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    order_.resize(first_[rows_]);
    std::vector<int64_t> at(first_.begin(), first_.end() - 1);
    for (int64_t p = 0; p < positions; ++p) {
      if (segment_[p] >= 0) order_[at[view_.index[p]]++] = int32_t(p);
    }
  }

  void by_span(const A* shared) {
    for (int64_t b = 0; b < batch_; ++b) {
      if (ranges_[b].begin < ranges_[b].end) order_.push_back(int32_t(b));
    }
    std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
      const Range &r = ranges_[a], &s = ranges_[b];
      if (r.begin != s.begin) return r.begin < s.begin;
      if (r.end != s.end) return r.end < s.end;
      if (r.origin != s.origin) return r.origin < s.origin;
      const int64_t size = modes_.count * view_.dim;
      return std::memcmp(shared + a * size, shared + b * size, size * sizeof(A)) < 0;
    });
  }

  Segments<T> view_;
  PoolModes modes_;
  const int32_t* argmax_;
  int64_t rows_, batch_;
  std::vector<Range> ranges_, mode_ranges_;  // [batch], [batch, modes]
  std::vector<int32_t> order_;               // spans: segments; index: positions by row
  std::vector<int32_t> segment_;             // index: of each position
  std::vector<int64_t> first_;               // index: where a row's positions begin in order_
};

}  // namespace emblas
