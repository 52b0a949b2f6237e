// Scores of real-valued queries against bit codes, by the table scan.
//
//   score(q, d) = sum_i q_i v_i(d),   v_i = sum over planes t of 2^-t (+1 or -1)
//
// One plane is a sign code. Further planes are residual bits (recurrent binarization, arXiv
// 2302.08714: the value of c bits is a uniform quantizer's), stored one plane after the other.
// For each nibble of a code the score takes one of 16 values, T[n]. The scan adds what is lost
// against the nibble's best value, rounded to 7 bits:
//   entry[n] = round(scale * (max T - T[n])),  |sum of entries - scale * loss(d)| <= error
// so codes whose rounded loss is above the k-th best's by more than the error are out for certain,
// and the few others are scored from the float tables. The answer is that of the exact score.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "binary/search.h"

namespace emblas {

class ScoreScan {
 public:
  // queries [count, dim]; codes of `bytes` = planes * ceil(dim / 8). `scale` multiplies the scores
  // of each row by a positive number (one over its length makes a cosine); null: 1.
  ScoreScan(const float* queries, int64_t stride, int64_t count, int64_t dim, int64_t bytes,
            int64_t k, const float* scale = nullptr, int64_t rows = 0)
      : bytes_(bytes), scale_(scale), tables_(size_t(count)) {
    start_.k = k;
    if (scale && rows > 0) {
      const auto [least, most] = std::minmax_element(scale, scale + rows);
      least_scale_ = double(*least);
      most_scale_ = double(*most);
    }
    for (int64_t q = 0; q < count; ++q) {
      build(queries + q * stride, dim, tables_[size_t(q)]);
      period_ = std::min<int64_t>(period_, 255 / (2 * std::max(tables_[size_t(q)].largest, 1)));
    }
  }

  const Collector& start() const { return start_; }
  int64_t queries() const { return int64_t(tables_.size()); }
  bool by_rows(int64_t) const { return false; }
  const uint8_t* query(int64_t) const { return nullptr; }

  int64_t width() const { return kTableBytes; }
  int64_t period() const { return period_; }
  void prepare(int64_t q, uint8_t* out) const {
    std::memcpy(out, tables_[size_t(q)].entries.data(), size_t(bytes_ * kTableBytes));
  }
  void scan(const ScanArgs& args) const { kernels<ScanKernels>().scan_tables(args); }

  uint32_t limit(int64_t q, const Collector& found) const {
    constexpr uint32_t everything = 0xffffffff;
    if (found.limit == std::numeric_limits<uint64_t>::max()) return everything;
    const Tables& tables = tables_[size_t(q)];
    // A row of any scale beats the k-th best only with a product above this.
    const double kth = double(ScoreKey::distance(found.limit));
    const double loss = tables.best - kth / (kth > 0 ? most_scale_ : least_scale_);
    const double limit = std::floor(loss * tables.scale + tables.error) + 1;
    return limit < double(everything) ? uint32_t(std::max(limit, 0.0)) : everything;
  }
  uint64_t key(int64_t q, int64_t row, uint32_t, const uint8_t* code) const {
    const float* exact = tables_[size_t(q)].exact.data();
    double score = 0;
    for (int64_t p = 0; p < bytes_; ++p) {
      score += double(exact[32 * p + (code[p] & 15)]) + double(exact[32 * p + 16 + (code[p] >> 4)]);
    }
    return ScoreKey::of(float(scale_ ? score * double(scale_[row]) : score), row);
  }

 private:
  struct Tables {
    std::vector<float> exact;      // [bytes, 32] T
    std::vector<uint8_t> entries;  // [bytes, 32]
    double best = 0, scale = 0, error = 0;
    int largest = 0;
  };

  void build(const float* query, int64_t dim, Tables& tables) const {
    const int64_t width = (dim + 7) / 8;
    tables.exact.resize(size_t(bytes_ * kTableBytes));
    tables.entries.resize(size_t(bytes_ * kTableBytes));
    std::vector<double> most(size_t(2 * bytes_));  // max T of each nibble
    double range = 0, total_range = 0;
    for (int64_t p = 0; p < bytes_; ++p) {
      const double weight = std::ldexp(1.0, -int(p / width));
      for (int half = 0; half < 2; ++half) {  // the low nibble holds the later dimensions
        const int64_t first = p % width * 8 + (half ? 0 : 4);
        double value[4], sum = 0;
        for (int64_t i = 0; i < 4; ++i) {
          value[i] = first + i < dim ? weight * double(query[first + i]) : 0;
          sum += std::fabs(value[i]);
        }
        float* exact = &tables.exact[size_t(kTableBytes * p + 16 * half)];
        double& best = most[size_t(2 * p + half)];
        best = -sum;
        for (int n = 0; n < 16; ++n) {
          double score = 0;
          for (int i = 0; i < 4; ++i) score += n >> (3 - i) & 1 ? value[i] : -value[i];
          exact[n] = float(score);
          best = std::max(best, double(exact[n]));
        }
        tables.best += best;
        range = std::max(range, 2 * sum);
        total_range += 2 * sum;
      }
    }
    if (range == 0) return;  // every code scores 0
    constexpr double kLargestSum = 65000;
    const double finest = std::min(kLargestEntry / range, kLargestSum / total_range);
    // Sums of few levels (another code's values) may be whole numbers of some power of two: the
    // smallest such scale is exact and lets more entries add up in a byte.
    const int top = std::ilogb(finest);
    bool exact = false;
    for (int exponent = top - 7; exponent <= top && !exact; ++exponent) {
      exact = fill(tables, most, std::ldexp(1.0, exponent));
    }
    if (!exact) fill(tables, most, finest);
    tables.error += 0.02;  // of scores rounded to float
  }

  // Returns whether all entries are exact.
  bool fill(Tables& tables, const std::vector<double>& most, double scale) const {
    tables.scale = scale;
    tables.error = 0;
    tables.largest = 0;
    for (size_t nibble = 0; nibble < most.size(); ++nibble) {
      double error = 0;
      for (size_t n = 0; n < 16; ++n) {
        const double loss = (most[nibble] - double(tables.exact[16 * nibble + n])) * scale;
        const int entry = int(loss + 0.5);
        error = std::max(error, std::fabs(loss - entry));
        tables.entries[16 * nibble + n] = uint8_t(entry);
        tables.largest = std::max(tables.largest, entry);
      }
      tables.error += error;
    }
    return tables.error == 0;
  }

  int64_t bytes_, period_ = 255;
  const float* scale_;
  double least_scale_ = 1, most_scale_ = 1;
  std::vector<Tables> tables_;
  Collector start_;
};

}  // namespace emblas
