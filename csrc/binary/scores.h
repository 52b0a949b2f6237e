// Scores of real-valued queries against bit codes, by the table scan.
//
//   score(q, d) = sum_i q_i v_i(d),   v_i = sum over planes t of 2^-t (+1 or -1)
//
// One plane is a sign code. Further planes are residual bits (recurrent binarization, arXiv
// 2302.08714: the value of c bits is a uniform quantizer's), stored one plane after the other.
// For each field of a few bits of a code (scan.h) the score takes one of 16 or 64 values, T[n]. The
// scan adds what is lost against the field's best value, rounded to a small integer:
//   entry[n] = round(scale * (max T - T[n])),  |sum of entries - scale * loss(d)| <= error
// so codes whose rounded loss is above the k-th best's by more than the error are out for certain,
// and the few others are scored from the float tables. The answer is that of the exact score.
// A single query is scanned by rows where the CPU can: the loss is then the sum of 2 |value| over
// the bits that differ from the best code's, each rounded to a small integer of its own.
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
      : bytes_(bytes),
        by_rows_(count == 1 && bytes <= kWidestWeighted && rows_kernel().planes > 0),
        scale_(scale),
        tables_(size_t(count)) {
    start_.k = k;
    if (scale && rows > 0) {
      const auto [least, most] = std::minmax_element(scale, scale + rows);
      least_scale_ = double(*least);
      most_scale_ = double(*most);
    }
    for (int64_t q = 0; q < count; ++q) {
      build(queries + q * stride, dim, tables_[size_t(q)]);
    }
    if (!by_rows_) find_runs();
  }

  const Collector& start() const { return start_; }
  int64_t queries() const { return int64_t(tables_.size()); }
  bool by_rows(int64_t) const { return by_rows_; }
  int64_t row_planes() const { return kRowPlanes; }
  void prepare_row(int64_t q, uint64_t* words) const {
    std::memcpy(words, tables_[size_t(q)].entries.data(), tables_[size_t(q)].entries.size());
  }

  int64_t prepared() const { return layout().prepared(bytes_); }
  const int64_t* runs() const { return runs_.data(); }
  int64_t groups() const { return layout().groups(bytes_); }
  void prepare(int64_t q, uint8_t* out) const {
    std::memcpy(out, tables_[size_t(q)].entries.data(), tables_[size_t(q)].entries.size());
  }
  void scan(const ScanArgs& args) const { kernel().scan_tables(args); }

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
    double parts[4] = {};  // one sum would wait for each addition
    for (int64_t p = 0; p < bytes_; ++p) {
      const float* tables = exact + 32 * p;
      parts[p % 2] += double(tables[code[p] & 15]);
      parts[2 + p % 2] += double(tables[16 + (code[p] >> 4)]);
    }
    const double score = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    return ScoreKey::of(float(scale_ ? score * double(scale_[row]) : score), row);
  }

 private:
  struct Tables {
    std::vector<float> exact;      // [bytes, 32] T of each nibble
    std::vector<uint8_t> entries;  // of the table layout, or a query of the scan by rows
    std::vector<int> most;         // of each group, the sum of its tables' largest entries
    double best = 0, scale = 0, error = 0;
  };

  void build(const float* query, int64_t dim, Tables& tables) const {
    const int64_t plane = (dim + 7) / 8;
    std::vector<double> value(size_t(8 * bytes_));  // of each bit of the code, lowest first
    double square = 0;
    for (int64_t p = 0; p < bytes_; ++p) {
      const double weight = std::ldexp(1.0, -int(p / plane));
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t at = p % plane * 8 + 7 - i;
        if (at < dim) value[size_t(8 * p + i)] = weight * double(query[at]);
        square += value[size_t(8 * p + i)] * value[size_t(8 * p + i)];
      }
    }
    tables.exact.resize(size_t(bytes_ * 32));
    for (size_t i = 0; i < tables.exact.size(); ++i) {
      double score = 0;
      for (size_t j = 0; j < 4; ++j) {
        score += i % 16 >> j & 1 ? value[i / 16 * 4 + j] : -value[i / 16 * 4 + j];
      }
      tables.exact[i] = float(score);
    }
    by_rows_ ? weigh_bits(value, tables) : fill_tables(value, std::sqrt(square), tables);
    tables.error += 0.02;  // of scores rounded to float
  }

  // Bits of the best code, and masks that weigh the others.
  void weigh_bits(const std::vector<double>& value, Tables& tables) const {
    const double kMost = (1 << kRowPlanes) - 1;
    double largest = 0;
    for (const double x : value) {
      tables.best += std::fabs(x);
      largest = std::max(largest, 2 * std::fabs(x));
    }
    tables.entries.resize(size_t((1 + kRowPlanes) * row_words(bytes_) * 8));
    if (largest == 0) return;  // every code scores 0
    const auto weight = [kMost](double x, double scale) {
      return std::min(kMost, std::floor(2 * std::fabs(x) * scale + 0.5));
    };
    // Of all scales the one that rounds least, whole numbers of a power of two not at all. Weights
    // that are too small cost codes scored in vain; only those that are too large count as error.
    double least = std::numeric_limits<double>::infinity();
    const auto consider = [&](double scale) {
      double larger = 0, smaller = 0;
      for (const double x : value) {
        const double rounding = weight(x, scale) - 2 * std::fabs(x) * scale;
        (rounding > 0 ? larger : smaller) += std::fabs(rounding);
      }
      if (larger + smaller >= least * scale) return;
      least = (larger + smaller) / scale;
      tables.scale = scale;
      tables.error = larger;
    };
    const double coarsest = kMost / largest;
    consider(std::ldexp(1.0, std::ilogb(coarsest)));
    for (int i = 0; i < 8; ++i) consider(coarsest * std::exp2(i / 4.0));
    const int64_t plane = row_words(bytes_) * 8;
    for (size_t i = 0; i < value.size(); ++i) {
      const int weighed = int(weight(value[i], tables.scale));
      uint8_t* byte = tables.entries.data() + i / 8;
      if (value[i] > 0) *byte |= uint8_t(1 << i % 8);
      for (int64_t t = 0; t < kRowPlanes; ++t) {
        byte[(1 + t) * plane] |= uint8_t((weighed >> (kRowPlanes - 1 - t) & 1) << i % 8);
      }
    }
  }

  void fill_tables(const std::vector<double>& value, double length, Tables& tables) const {
    // loss[n]: what a field loses to its best value if it is n.
    const TableLayout& form = layout();
    const int64_t count = int64_t(1) << form.bits, fields = form.prepared(bytes_) / count;
    std::vector<double> loss(size_t(fields * count));
    double range = 0, group_range = 0, total_range = 0;  // of a group's and of all losses
    for (int64_t f = 0; f < fields; ++f) {
      const auto of = [&](int64_t i) {
        const int64_t bit = form.bit(f, i);
        return bit < 8 * bytes_ ? value[size_t(bit)] : 0.0;
      };
      double* table = &loss[size_t(f * count)];
      double most = 0;
      for (int64_t i = 0; i < form.bits; ++i) {
        most += std::fabs(of(i));
        table[0] += std::fabs(of(i)) + of(i);
      }
      for (int64_t n = 1; n < count; ++n) {
        table[n] = std::max(0.0, table[n & (n - 1)] - 2 * of(__builtin_ctzll(uint64_t(n))));
      }
      tables.best += most;
      total_range += 2 * most;
      group_range = f % form.tables == 0 ? 2 * most : group_range + 2 * most;
      range = std::max(range, group_range);
    }
    tables.entries.resize(loss.size());
    tables.most.resize(size_t(form.groups(bytes_)));
    if (range == 0) return;  // every code scores 0
    constexpr double kLargestSum = 65000;
    // Rounded up, the entries of a group still fit in a byte together.
    const double finest =
        std::min((255 - 0.5 * double(form.tables)) / range, kLargestSum / total_range);
    // Sums of few levels (another code's values) may be whole numbers of some power of two: the
    // smallest such scale is exact and lets more entries add up in a byte. Otherwise entries are
    // rounded, as coarsely as keeps the error at half of what scores of random codes vary by: few
    // codes are scored in vain, and again more entries add up.
    const int top = std::ilogb(finest);
    int exponent = top - 7;
    while (exponent <= top && !whole(value, std::ldexp(2.0, exponent))) ++exponent;
    const double rounded = 0.5 * double(fields);
    tables.error = exponent <= top ? 0 : rounded;
    tables.scale =
        exponent <= top ? std::ldexp(1.0, exponent) : std::min(finest, 2 * rounded / length);
    for (size_t i = 0; i < loss.size(); ++i) {
      tables.entries[i] = uint8_t(int(loss[i] * tables.scale + 0.5));
    }
    for (int64_t f = 0; f < fields; ++f) {
      const auto table = tables.entries.begin() + f * count;
      tables.most[size_t(f / form.tables)] += *std::max_element(table, table + count);
    }
  }

  static bool whole(const std::vector<double>& values, double scale) {
    return std::all_of(values.begin(), values.end(),
                       [scale](double x) { return x * scale == double(int(x * scale)); });
  }

  // Runs of groups, each as long as the largest entries of every query together fit in a byte.
  void find_runs() {
    const int64_t groups = layout().groups(bytes_);
    std::vector<int> sums(tables_.size());
    for (int64_t group = 0; group < groups; ++group) {
      const auto add = [&](const Tables& tables, int sum) {
        return sum + tables.most[size_t(group)];
      };
      std::vector<int> longer(tables_.size());
      std::transform(tables_.begin(), tables_.end(), sums.begin(), longer.begin(), add);
      const bool fits =
          std::all_of(longer.begin(), longer.end(), [](int sum) { return sum < 256; });
      if (!fits) {
        runs_.push_back(group);
        for (size_t q = 0; q < tables_.size(); ++q) longer[q] -= sums[q];
      }
      sums = longer;
    }
    runs_.push_back(groups);
  }

  static const ScanKernels& kernel() { return kernels<ScanKernels>(); }
  static const RowScanKernels& rows_kernel() { return kernels<RowScanKernels>(); }
  static const TableLayout& layout() { return kernel().tables; }

  int64_t bytes_;
  bool by_rows_;
  const float* scale_;
  double least_scale_ = 1, most_scale_ = 1;
  std::vector<Tables> tables_;
  std::vector<int64_t> runs_;
  Collector start_;
};

}  // namespace emblas
