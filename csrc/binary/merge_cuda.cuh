// From the lists of a scan to results.
//
// Lists of neighbouring ranges of rows are merged, 16 to 1, in the way they were filled, until each
// query has one. Ranking counts for each entry how many are smaller: k^2 comparisons, all
// independent. Bytes: 8 for each entry of a list, written and read once in a merge, and the
// results.
#pragma once

#include "binary/nearest_cuda.cuh"

namespace emblas::cuda {

// A warp adds up the counts of a query's lists. Grid (ceil(queries / kSearchWarps)).
__global__ void __launch_bounds__(kSearchThreads)
    sum_counts(const int64_t* of_lists, int64_t lists, int64_t queries, int64_t* counts) {
  const int64_t query = int64_t(blockIdx.x) * kSearchWarps + threadIdx.x / 32;
  if (query >= queries) return;
  int64_t total = 0;
  for (int64_t i = threadIdx.x % 32; i < lists; i += 32) total += of_lists[query * lists + i];
  total = simt::warp_sum(total);
  if (threadIdx.x % 32 == 0) counts[query] = total;
}

// A warp merges up to kMergedLists lists of a query. Grid (ceil(queries * to.count /
// kSearchWarps)).
template <int bits>
__global__ void __launch_bounds__(kSearchThreads, 4)
    merge_lists(const uint64_t* entries, Lists from, uint64_t* merged, Lists to, int64_t queries) {
  SIMT_SHARED(unsigned, bins, [kSearchWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t own = int64_t(blockIdx.x) * kSearchWarps + warp;
  if (own >= queries * to.count) return;
  const int64_t query = own / to.count, first = own % to.count * kMergedLists;
  const int64_t left = from.count - first;
  const unsigned keep = unsigned(from.keep);
  const unsigned count = unsigned(min(left, int64_t(kMergedLists))) * keep;
  entries += (query * from.count + first) * from.capacity;
  Nearest<bits> nearest(merged + own * to.capacity, to.keep, {0, kNoDistance}, bins[warp]);
  constexpr int ahead = 4;  // loads under way
  for (unsigned at = 0; at < count; at += 32 * ahead) {
    uint64_t entry[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const unsigned i = at + 32 * j + lane;
      entry[j] = i < count ? entries[i / keep * from.capacity + i % keep] : kNothing;
    }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      nearest.offer(entry[j], j == ahead - 1 && at + 32 * ahead >= count);
    }
  }
}

// A thread places one entry of a query's last list; `rows` translates if given. Grid (queries *
// ceil(k / kSearchThreads)).
template <class Value>
__global__ void __launch_bounds__(kSearchThreads)
    rank_entries(const uint64_t* entries, Lists list, int64_t k, const int64_t* rows, Value* values,
                 int64_t* ids) {
  SIMT_SHARED(uint64_t, others, [kSearchThreads]);
  const int64_t blocks = (k + kSearchThreads - 1) / kSearchThreads;  // of a query
  const int64_t query = blockIdx.x / blocks;
  const int64_t i = blockIdx.x % blocks * kSearchThreads + threadIdx.x;
  entries += query * list.capacity;
  const uint64_t own = i < list.keep ? entries[i] : kNothing;
  int64_t rank = 0;
  for (int64_t first = 0; first < list.keep; first += kSearchThreads) {
    const int64_t left = list.keep - first;
    const int count = int(min(left, int64_t(kSearchThreads)));
    if (threadIdx.x < unsigned(count)) others[threadIdx.x] = entries[first + threadIdx.x];
    __syncthreads();
    for (int o = 0; o < count; ++o) rank += others[o] < own;
    __syncthreads();
  }
  if (i >= k) return;
  // Only the end of the list and what is beyond can hold nothing: place i is free then.
  const bool found = own != kNothing;
  const int64_t at = query * k + (found ? rank : i);
  const int64_t row = int64_t(own & 0xffffffffu);
  values[at] = value_of<Value>(distance_of(own));
  ids[at] = !found ? -1 : rows ? rows[row] : row;
}

}  // namespace emblas::cuda
