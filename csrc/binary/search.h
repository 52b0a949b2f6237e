// Exact Hamming top-k over the kernels of binary.h, for both doors: torch and numpy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "binary/binary.h"
#include "common/isa.h"

namespace emblas {

struct HammingTopk {
  const uint8_t* queries;
  int64_t query_stride, query_count;
  const uint8_t* codes;
  int64_t code_stride, code_count;
  int64_t bytes, k;
  int32_t* distances;  // [query_count, k]
  int64_t* ids;        // [query_count, k]
};

inline void tighten(Candidates& list) {
  std::nth_element(list.keys, list.keys + list.k - 1, list.keys + list.count);
  list.count = list.k;
  list.limit = list.keys[list.k - 1] >> kRowBits;
}

// The k best of codes [first, last) for queries [begin, end), appended to found[query - begin].
inline void search_range(const HammingTopk& args, int64_t begin, int64_t end, int64_t first,
                         int64_t last, std::vector<std::vector<uint64_t>>& found,
                         std::mutex& lock) {
  const HammingKernels& kernel = kernels<HammingKernels>();
  const int64_t words = (args.bytes + 7) / 8, queries = end - begin;
  std::vector<uint64_t> prepared(queries * words);
  for (int64_t q = 0; q < queries; ++q) {
    kernel.prepare(args.queries + (begin + q) * args.query_stride, args.bytes,
                   prepared.data() + q * words);
  }
  constexpr int64_t kRearrangeFrom = 3;  // queries; fewer don't earn the rearranging back
  const int64_t tile_bytes = 128 << 10;  // a part of L2, which every query reads again
  const int64_t tile_codes =
      std::max<int64_t>(1, tile_bytes / (8 * words) / kernel.block) * kernel.block;
  std::vector<uint64_t> storage(tile_codes * words + 8);
  uint64_t* tile = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) / 8 % 8;

  const int64_t k = std::min(args.k, last - first);
  const int64_t capacity = std::max<int64_t>(2 * k, k + 32);
  std::vector<uint64_t> keys(queries * capacity);
  std::vector<Candidates> candidates(queries);
  for (int64_t q = 0; q < queries; ++q) {
    candidates[q] = {keys.data() + q * capacity, 0, capacity, k, kNoLimit};
  }
  for (int64_t row = first; row < last; row += tile_codes) {
    const int64_t count = std::min(tile_codes, last - row);
    const uint8_t* codes = args.codes + row * args.code_stride;
    if (queries < kRearrangeFrom) {
      for (int64_t q = 0; q < queries; ++q) {
        kernel.scan_rows(codes, args.code_stride, count, row, args.bytes,
                         prepared.data() + q * words, candidates[q], tighten);
      }
      continue;
    }
    kernel.arrange(codes, args.code_stride, count, args.bytes, tile);
    kernel.scan(tile, count, row, words, prepared.data(), queries, candidates.data(), tighten);
  }
  const std::lock_guard<std::mutex> guard(lock);
  for (int64_t q = 0; q < queries; ++q) {
    Candidates& list = candidates[q];
    if (list.count > k) tighten(list);
    found[begin + q].insert(found[begin + q].end(), list.keys, list.keys + list.count);
  }
}

// parallel(count, bytes_per_item, body) runs body(first, last) over [0, count). The ranges may be
// any: keys are unique, so the best k of their union don't depend on how it was cut.
template <class Parallel>
void hamming_topk(const HammingTopk& args, const Parallel& parallel) {
  std::vector<std::vector<uint64_t>> found(args.query_count);
  std::mutex lock;
  if (args.k > 0 && args.bytes > 0) {
    if (args.code_count >= args.query_count) {
      parallel(args.code_count, args.bytes * args.query_count, [&](int64_t first, int64_t last) {
        search_range(args, 0, args.query_count, first, last, found, lock);
      });
    } else if (args.code_count > 0) {
      parallel(args.query_count, args.bytes * args.code_count, [&](int64_t begin, int64_t end) {
        search_range(args, begin, end, 0, args.code_count, found, lock);
      });
    }
  } else if (args.k > 0) {  // codes without a bit: all at distance 0
    for (auto& keys : found) {
      for (int64_t row = 0; row < std::min(args.k, args.code_count); ++row) keys.push_back(row);
    }
  }
  for (int64_t q = 0; q < args.query_count; ++q) {
    std::vector<uint64_t>& keys = found[q];
    std::sort(keys.begin(), keys.end());
    for (int64_t i = 0; i < args.k; ++i) {
      const bool exists = i < int64_t(keys.size());
      args.distances[q * args.k + i] =
          exists ? int32_t(keys[i] >> kRowBits) : std::numeric_limits<int32_t>::max();
      args.ids[q * args.k + i] = exists ? int64_t(keys[i] & ((uint64_t(1) << kRowBits) - 1)) : -1;
    }
  }
}

}  // namespace emblas
