// Exact search over the scan kernels, for both doors: torch and numpy.
//
// Results are ordered as integers, key = distance above row: ascending distance, then ascending
// row. Keys are unique, so the best of a union doesn't depend on how the rows were cut into tiles
// and threads. Working memory: the best keys of each query and one tile per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "binary/scan.h"
#include "common/aligned.h"
#include "common/isa.h"

namespace emblas {

inline constexpr int64_t kKeepAll = std::numeric_limits<int64_t>::max();

struct Codes {
  const uint8_t* data;
  int64_t stride, count, bytes;

  const uint8_t* at(int64_t row) const { return data + row * stride; }
};

// Which rows a search may return. Bit 7 of byte 0 of a bitmap is row 0.
struct Filter {
  const uint8_t* bitmaps = nullptr;
  int64_t bitmap_stride = 0;     // 0: all queries share one
  const int64_t* ids = nullptr;  // ascending
  int64_t id_count = 0;

  bool allows(int64_t query, int64_t row) const {
    return !bitmaps || (bitmaps[query * bitmap_stride + row / 8] >> (7 - row % 8) & 1);
  }
};

// Memory for blocks of codes, aligned to a cache line.
class Tile {
 public:
  static constexpr int64_t kBytes = 128 << 10;  // a part of L2, which every query reads again

  // Codes of a tile.
  static int64_t capacity(int64_t bytes) {
    return std::max<int64_t>(1, kBytes / std::max<int64_t>(bytes, 1) / kBlock) * kBlock;
  }

  explicit Tile(int64_t bytes = 0) : storage_(aligned_array<uint8_t>(bytes)) {}
  uint8_t* data() const { return storage_.get(); }

 private:
  AlignedArray<uint8_t> storage_;
};

// Set bits of the bytes [first, last): 8 bytes at a time, without popcount instructions.
inline int64_t count_bits(const uint8_t* first, const uint8_t* last) {
  int64_t total = 0;
  for (; first < last; first += 8) {
    uint64_t word = 0;
    std::memcpy(&word, first, size_t(std::min<int64_t>(8, last - first)));
    word -= word >> 1 & 0x5555555555555555;
    word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
    total += int64_t(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
  }
  return total;
}

// What is kept of the codes that are offered to one query: the k smallest keys below the limit.
struct Collector {
  std::vector<uint64_t> keys;
  int64_t k = 0;
  bool fixed_limit = false;  // a radius: what is dropped was still found
  uint64_t limit = std::numeric_limits<uint64_t>::max();
  int64_t dropped = 0;

  void add(uint64_t key) {
    keys.push_back(key);
    // Often enough that the limit is hardly older than the codes that it is compared with.
    if (k < kKeepAll && int64_t(keys.size()) >= k + std::max<int64_t>(k / 2, 8)) tighten();
  }
  void tighten() {
    if (int64_t(keys.size()) <= k) return;
    if (k > 0) std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end());
    dropped += int64_t(keys.size()) - k;
    keys.resize(size_t(k));
    if (!fixed_limit && k > 0) limit = keys[size_t(k) - 1];
  }
  void merge(const Collector& other) {
    keys.insert(keys.end(), other.keys.begin(), other.keys.end());
    dropped += other.dropped;
    tighten();
  }
};

// A float score and its row as one integer: descending score, then ascending row.
struct ScoreKey {
  static constexpr int kRowBits = 32;

  static uint64_t of(float score, int64_t row) {
    if (score != score) score = -std::numeric_limits<float>::infinity();  // NaN comes last
    score += 0.0f;                                                        // -0 ties with 0
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(~ascending) << kRowBits | uint64_t(row);
  }
  static float distance(uint64_t key) {
    const uint32_t ascending = ~uint32_t(key >> kRowBits);
    const uint32_t bits = ascending >> 31 ? ascending & 0x7fffffffu : ~ascending;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
  }
  static int64_t row(uint64_t key) { return int64_t(key & 0xffffffff); }
};

// Hamming distances: sums are the distances themselves.
class HammingScan {
 public:
  static constexpr int kRowBits = 40;
  static constexpr int64_t kRearrangeFrom = 3;  // queries; fewer don't earn the rearranging back

  HammingScan(const Codes& queries, int64_t k) : queries_(queries) { start_.k = k; }
  HammingScan(const Codes& queries, int64_t k, int64_t radius) : HammingScan(queries, k) {
    start_.fixed_limit = true;
    start_.limit = uint64_t(std::min<int64_t>(radius, 8 * queries.bytes) + 1) << kRowBits;
  }

  const Collector& start() const { return start_; }
  int64_t queries() const { return queries_.count; }
  bool by_rows(int64_t queries) const {
    return queries < kRearrangeFrom || queries_.bytes > kWidestScan || queries_.bytes == 0;
  }
  int64_t row_planes() const { return 0; }
  void prepare_row(int64_t q, uint64_t* words) const {
    if (queries_.bytes > 0) std::memcpy(words, queries_.at(q), size_t(queries_.bytes));
  }

  int64_t prepared() const { return queries_.bytes * kernel().hamming_width; }
  const int64_t* runs() const { return nullptr; }
  int64_t groups() const { return 0; }
  void prepare(int64_t q, uint8_t* out) const {
    kernel().prepare_hamming(queries_.at(q), queries_.bytes, out);
  }
  void scan(const ScanArgs& args) const { kernel().scan_hamming(args); }
  uint32_t limit(int64_t, const Collector& found) const {
    return uint32_t(std::min<uint64_t>(found.limit >> kRowBits, 0xffffffff));
  }
  uint64_t key(int64_t, int64_t row, uint32_t sum, const uint8_t*) const {
    return uint64_t(sum) << kRowBits | uint64_t(row);
  }
  static int32_t distance(uint64_t key) { return int32_t(key >> kRowBits); }
  static int64_t row(uint64_t key) { return int64_t(key & ((uint64_t(1) << kRowBits) - 1)); }

 private:
  static const ScanKernels& kernel() { return kernels<ScanKernels>(); }
  Codes queries_;
  Collector start_;
};

struct SearchOptions {
  Filter filter;
  bool later_only = false;  // of row q's query only rows after q: each pair of a self-join once
};

// One pass of one thread over rows [first, last) of the codes, or of the list of ids.
template <class Scan>
class Pass {
 public:
  Pass(const Scan& scan, const Codes& codes, const SearchOptions& options)
      : scan_(scan), codes_(codes), options_(options) {}

  // Offers the rows to queries [begin, end), whose results are found[query - begin].
  void run(int64_t begin, int64_t end, int64_t first, int64_t last, Collector* found) {
    begin_ = begin;
    found_ = found;
    limits_.resize(size_t(end - begin));
    const bool own_bitmaps = options_.filter.bitmaps && options_.filter.bitmap_stride != 0;
    if (!own_bitmaps) {
      scan_rows(begin, end, first, last, gathers(begin, end, first, last));
      return;
    }
    // Queries with few rows of their own gather them; the others share a pass and mask.
    int64_t from = begin;
    for (int64_t q = begin; q < end; ++q) {
      if (!gathers(q, q + 1, first, last)) continue;
      if (from < q) scan_rows(from, q, first, last, false);
      scan_rows(q, q + 1, first, last, true);
      from = q + 1;
    }
    if (from < end) scan_rows(from, end, first, last, false);
  }

 private:
  // Gathering the allowed rows beats masking the others out below these shares of rows, measured at
  // 1M codes of 256 bits: a lone query pays the cache misses of its gathered rows itself, while
  // a gathered tile also spares every query of a batch the work on the other rows.
  static constexpr double kGatherRowsBelow = 0.06;
  static constexpr double kGatherTilesBelow = 0.9;

  struct Part {  // of the rows, as much as a tile holds
    int64_t first;
    Rows rows;
  };

  bool gathers(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    if (!options_.filter.bitmaps) return false;
    const uint8_t* bitmap = options_.filter.bitmaps + begin * options_.filter.bitmap_stride;
    const double share = scan_.by_rows(end - begin) ? kGatherRowsBelow : kGatherTilesBelow;
    return double(count_bits(bitmap + first / 8, bitmap + (last + 7) / 8)) <
           double(last - first) * share;
  }

  void scan_rows(int64_t begin, int64_t end, int64_t first, int64_t last, bool gather) {
    const bool by_rows = scan_.by_rows(end - begin);
    const int64_t capacity = Tile::capacity(codes_.bytes);
    if (options_.later_only && !options_.filter.ids) first = std::max(first, begin + 1);
    prepare(begin, end, by_rows, capacity);
    const auto take = [&](std::vector<int64_t>& gathered) {
      Part part{first, {codes_.data, codes_.stride, nullptr, std::min(capacity, last - first)}};
      if (options_.filter.ids) {
        part.rows.rows = options_.filter.ids + first;
      } else if (gather) {
        first = gather_rows(begin, first, last, capacity, gathered);
        part.rows.rows = gathered.data();
        part.rows.count = int64_t(gathered.size());
        return part;
      } else {
        part.rows.codes = codes_.at(first);
      }
      first += part.rows.count;
      return part;
    };
    Part part = take(gathered_[0]);
    for (int turn = 1; part.rows.count > 0; turn ^= 1) {
      const Part next = take(gathered_[turn]);
      part_ = part;
      scan_tile(begin, end, next.rows, by_rows);
      part = next;
    }
  }

  // Lists up to `capacity` allowed rows from `first` on; returns where to go on.
  int64_t gather_rows(int64_t query, int64_t first, int64_t last, int64_t capacity,
                      std::vector<int64_t>& gathered) const {
    const uint8_t* bitmap = options_.filter.bitmaps + query * options_.filter.bitmap_stride;
    gathered.clear();
    while (first < last && int64_t(gathered.size()) < capacity) {
      if (first % 64 == 0 && first + 64 <= last && int64_t(gathered.size()) + 64 <= capacity) {
        uint64_t word = 0;
        for (int i = 0; i < 8; ++i) word = word << 8 | bitmap[first / 8 + i];
        for (; word; word &= ~(uint64_t(1) << 63 >> __builtin_clzll(word))) {
          gathered.push_back(first + __builtin_clzll(word));
        }
        first += 64;
      } else {
        if (bitmap[first / 8] >> (7 - first % 8) & 1) gathered.push_back(first);
        ++first;
      }
    }
    return first;
  }

  void prepare(int64_t begin, int64_t end, bool by_rows, int64_t capacity) {
    for (int64_t q = begin; q < end; ++q) {
      limits_[size_t(q - begin_)] = scan_.limit(q, found_[q - begin_]);
    }
    const int64_t queries = end - begin;
    if (by_rows) {
      words_.assign(size_t(queries * words()), 0);
      for (int64_t q = 0; q < queries; ++q) {
        scan_.prepare_row(begin + q, words_.data() + q * words());
      }
      return;
    }
    prepared_ = Tile(queries * scan_.prepared());
    for (int64_t q = 0; q < queries; ++q) {
      scan_.prepare(begin + q, prepared_.data() + q * scan_.prepared());
    }
    if (capacity * codes_.bytes + kPastTile != tile_bytes_) {
      tile_bytes_ = capacity * codes_.bytes + kPastTile;
      tile_ = Tile(tile_bytes_);
      highest_ = Tile(capacity * scan_.groups());
    }
  }

  void scan_tile(int64_t begin, int64_t end, const Rows& next, bool by_rows) {
    if (by_rows) {
      for (int64_t q = begin; q < end; ++q) {
        first_query_ = q;
        kernels<RowScanKernels>().scan_rows(
            {part_.rows, codes_.bytes, words_.data() + (q - begin) * words(), scan_.row_planes(),
             &limits_[size_t(q - begin_)], this, &Pass::offer});
      }
      return;
    }
    first_query_ = begin;
    kernels<ScanKernels>().interleave(part_.rows, codes_.bytes, tile_.data());
    scan_.scan({tile_.data(), part_.rows.count, codes_.bytes, prepared_.data(), end - begin,
                scan_.runs(), highest_.data(), next, &limits_[size_t(begin - begin_)], this,
                &Pass::offer});
  }

  static void offer(void* context, int64_t query, int64_t position, uint32_t sum) {
    Pass& self = *static_cast<Pass*>(context);
    const int64_t q = self.first_query_ + query;
    const Part& part = self.part_;
    const int64_t row = part.rows.rows ? part.rows.rows[position] : part.first + position;
    if (!self.options_.filter.allows(q, row)) return;
    if (self.options_.later_only && row <= q) return;
    Collector& found = self.found_[q - self.begin_];
    const uint64_t key = self.scan_.key(q, row, sum, self.codes_.at(row));
    if (key >= found.limit) return;
    found.add(key);
    self.limits_[size_t(q - self.begin_)] = self.scan_.limit(q, found);
  }

  int64_t words() const { return (1 + scan_.row_planes()) * row_words(codes_.bytes); }

  const Scan& scan_;
  const Codes& codes_;
  const SearchOptions& options_;
  Tile prepared_, tile_, highest_;
  int64_t tile_bytes_ = 0;
  std::vector<uint64_t> words_;
  std::vector<int64_t> gathered_[2];
  std::vector<uint32_t> limits_;
  Collector* found_ = nullptr;
  int64_t begin_ = 0, first_query_ = 0;
  Part part_ = {};
};

// Everything found for every query, each sorted. parallel(count, bytes_per_item, body) runs
// body(first, last) over [0, count), cut anyhow.
template <class Scan, class Parallel>
std::vector<Collector> search(const Scan& scan, const Codes& codes, const SearchOptions& options,
                              const Parallel& parallel) {
  constexpr int64_t kQueriesPerPass = 256;  // bounds the memory of prepared queries
  const int64_t queries = scan.queries();
  std::vector<Collector> found(size_t(queries), scan.start());
  const int64_t rows = options.filter.ids ? options.filter.id_count : codes.count;
  std::mutex lock;
  const auto pass = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    Pass<Scan> one(scan, codes, options);
    for (; begin < end; begin += kQueriesPerPass) {
      const int64_t until = std::min(end, begin + kQueriesPerPass);
      std::vector<Collector> part(size_t(until - begin), scan.start());
      one.run(begin, until, first, last, part.data());
      const std::lock_guard<std::mutex> guard(lock);
      for (int64_t q = begin; q < until; ++q) found[size_t(q)].merge(part[size_t(q - begin)]);
    }
  };
  if (rows >= queries) {
    parallel(rows, codes.bytes * queries,
             [&](int64_t first, int64_t last) { pass(0, queries, first, last); });
  } else if (rows > 0) {
    parallel(queries, codes.bytes * rows,
             [&](int64_t begin, int64_t end) { pass(begin, end, 0, rows); });
  }
  for (Collector& one : found) {
    one.tighten();
    std::sort(one.keys.begin(), one.keys.end());
  }
  return found;
}

// The first k keys of each query as rows of two arrays, filled up with "none".
template <class Scan, class Distance>
void write_topk(const std::vector<Collector>& found, int64_t k, Distance none, Distance* distances,
                int64_t* ids) {
  for (size_t q = 0; q < found.size(); ++q) {
    const std::vector<uint64_t>& keys = found[q].keys;
    for (int64_t i = 0; i < k; ++i) {
      const bool exists = i < int64_t(keys.size());
      distances[int64_t(q) * k + i] = exists ? Scan::distance(keys[size_t(i)]) : none;
      ids[int64_t(q) * k + i] = exists ? Scan::row(keys[size_t(i)]) : -1;
    }
  }
}

// All distances, out[query * codes.count + row].
inline void hamming_distances(const Codes& queries, const Codes& codes, int64_t first, int64_t last,
                              int32_t* out) {
  if (codes.bytes == 0 || codes.bytes > kWidestScan) {
    std::vector<uint64_t> words(size_t(row_words(codes.bytes)));
    for (int64_t q = 0; q < queries.count; ++q) {
      std::memcpy(words.data(), queries.at(q), size_t(codes.bytes));
      int32_t* to = out + q * codes.count + first;
      uint32_t limit = 0xffffffff;
      kernels<RowScanKernels>().scan_rows(
          {{codes.at(first), codes.stride, nullptr, last - first},
           codes.bytes,
           words.data(),
           0,
           &limit,
           to,
           [](void* context, int64_t, int64_t position, uint32_t sum) {
             static_cast<int32_t*>(context)[position] = int32_t(sum);
           }});
    }
    return;
  }
  const ScanKernels& kernel = kernels<ScanKernels>();
  const int64_t capacity = Tile::capacity(codes.bytes);
  Tile tile(capacity * codes.bytes);
  const int64_t width = codes.bytes * kernel.hamming_width;
  std::vector<uint8_t> prepared(size_t(queries.count * width));
  for (int64_t q = 0; q < queries.count; ++q) {
    kernel.prepare_hamming(queries.at(q), codes.bytes, prepared.data() + q * width);
  }
  const auto rows_at = [&](int64_t row) -> Rows {
    return {codes.at(row), codes.stride, nullptr, std::min(capacity, last - row)};
  };
  for (int64_t row = first; row < last; row += capacity) {
    const Rows rows = rows_at(row);
    kernel.interleave(rows, codes.bytes, tile.data());
    kernel.distances({tile.data(), rows.count, codes.bytes, prepared.data(), queries.count, nullptr,
                      nullptr, rows_at(std::min(row + capacity, last)), nullptr, nullptr, nullptr},
                     out + row, codes.count);
  }
}

}  // namespace emblas
