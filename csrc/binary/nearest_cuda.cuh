// The nearest rows on a GPU: lists that one warp each fills, merges, and puts in order.
//
// Distances are whole numbers below 2^15 and results are ordered by distance, then by row, so one
// number says it all: an entry is the distance above 48 bits of row. A list is offered rows in
// ascending order. It appends those that are nearer than its limit, and when it has grown by
// kListSlack it shrinks to the `keep` nearest: three histograms, of five bits each, give the
// distance of the last one kept, which is the new limit (a later row at that distance comes after
// `keep` others). After the first few hundred rows hardly any row passes the
// limit, so a row costs one comparison. Nothing depends on the order in which threads run.
//
// Lists of neighbouring ranges are merged the same way, 16 to 1, until each query has one. Ranking
// counts for each entry how many are smaller: k^2 comparisons, all independent.
//
// Bytes: 8 for each entry kept, written and read once in a merge; list memory stays in the L2
// cache.
#pragma once

#include "binary/binary_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr int kSearchWarps = 8;
inline constexpr int kSearchThreads = 32 * kSearchWarps;
inline constexpr int kRowBits = 48;
inline constexpr int kDistanceBits = 15;
inline constexpr uint64_t kNothing = ~uint64_t(0);  // fills a list that found too few
inline constexpr unsigned kNoDistance = 0xffff;     // of a row that is not to be found

__device__ inline unsigned distance_of(uint64_t entry) { return unsigned(entry >> kRowBits); }
__device__ inline uint64_t entry_of(unsigned distance, int64_t row) {
  return uint64_t(distance) << kRowBits | uint64_t(row);
}

// A list and its state, held by the 32 lanes of a warp, which call everything together.
class Nearest {
 public:
  struct State {
    int count;
    unsigned limit;  // only distances below are found
  };
  // `bins` is shared memory of this warp.
  __device__ Nearest(uint64_t* list, int keep, State state, unsigned (&bins)[32])
      : list_(list),
        bins_(bins),
        keep_(keep),
        count_(state.count),
        limit_(state.limit),
        lane_(threadIdx.x % 32) {}
  __device__ State state() const { return {count_, limit_}; }

  // Each lane offers one entry; entries come in ascending order of rows, over lanes and calls. The
  // last call leaves `keep` entries in this order, kNothing at the end if they are too few.
  __device__ __forceinline__ void offer(uint64_t entry, bool last) {
    const bool nearer = distance_of(entry) < limit_;
    const unsigned found = __ballot_sync(simt::kAllLanes, nearer);
    if (nearer) list_[count_ + lanes_before(found)] = entry;
    count_ += __popc(found);
    if (count_ > keep_ + (last ? 0 : kListSlack - 32)) shrink();
    if (!last) return;
    for (int i = count_ + lane_; i < keep_; i += 32) list_[i] = kNothing;
  }

 private:
  __device__ unsigned lanes_before(unsigned lanes) const {
    return __popc(lanes & ((1u << lane_) - 1));
  }

  __device__ __forceinline__ void shrink() {
    // The keep-th smallest distance, five bits at a time; `ties` of the entries at it are kept.
    unsigned last = 0, ties = unsigned(keep_);
    for (int shift = kDistanceBits - 5; shift >= 0; shift -= 5) {
      bins_[lane_] = 0;
      __syncwarp();
      for (int i = lane_; i < count_; i += 32) {
        const unsigned distance = distance_of(list_[i]);
        if (distance >> (shift + 5) == last) atomicAdd(&bins_[distance >> shift & 31], 1u);
      }
      __syncwarp();
      last = last << 5 | bin_of(ties);
    }
    limit_ = last;

    // Moves what is kept to the front; an entry never moves back.
    int kept = 0;
    for (int first = 0; first < count_; first += 32) {
      const uint64_t entry = first + lane_ < count_ ? list_[first + lane_] : kNothing;
      const unsigned distance = distance_of(entry);
      const unsigned equal = __ballot_sync(simt::kAllLanes, distance == last);
      const bool keep = distance < last || (distance == last && lanes_before(equal) < ties);
      const unsigned passed = __popc(equal);
      ties = passed < ties ? ties - passed : 0;
      const unsigned lanes = __ballot_sync(simt::kAllLanes, keep);
      __syncwarp();
      if (keep) list_[kept + lanes_before(lanes)] = entry;
      kept += __popc(lanes);
    }
    count_ = keep_;
  }

  // The bin that holds the wanted-th entry (from 1); leaves its number within the bin.
  __device__ __forceinline__ unsigned bin_of(unsigned& wanted) const {
    const unsigned own = bins_[lane_];
    unsigned through = own;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned others = __shfl_up_sync(simt::kAllLanes, through, step);
      if (lane_ >= step) through += others;
    }
    const unsigned before = through - own;
    const bool holds = before < wanted && wanted <= through;
    const int bin = __ffs(__ballot_sync(simt::kAllLanes, holds)) - 1;
    wanted -= __shfl_sync(simt::kAllLanes, before, bin);
    return unsigned(bin);
  }

  uint64_t* list_;
  unsigned (&bins_)[32];
  int keep_, count_;
  unsigned limit_;
  int lane_;
};

// The rows that are searched, by place: all of them, or those that are listed.
struct Places {
  RowFilter filter;
  int64_t count;
  int64_t rows;
  bool later_only;  // only rows after the query's own number

  // The row at a place; beyond the end another row stands in.
  __device__ int64_t row(int64_t place) const {
    place = place < count ? place : count - 1;
    if (!filter.ids) return place;
    const int64_t id = filter.ids[place];
    return id < 0 ? 0 : id < rows ? id : rows - 1;
  }
  __device__ bool hold(int64_t query, int64_t place) const {
    if (place >= count || (later_only && row(place) <= query)) return false;
    if (!filter.bitmaps) return true;
    const uint8_t byte = filter.bitmaps[query * filter.bitmap_stride + place / 8];
    return byte >> (7 - place % 8) & 1;
  }
};

// Takes distances of a tile, for one query and one list of `tiles_per_list` tiles: keeps the
// nearest and counts.
struct KeepNearest {
  Lists lists;
  unsigned limit;   // only distances below count
  uint64_t* found;  // [queries, lists.count, lists.capacity]
  int64_t* counts;  // [queries, lists.count], or null

  struct State {
    Nearest::State nearest;
    int64_t within;
  };
  template <class ScanArgs>
  __device__ void take(const ScanArgs& args, int64_t query, int64_t list, int64_t t,
                       const uint16_t* distances, State& state) const {
    SIMT_SHARED(unsigned, bins, [kSearchWarps][32]);
    const int lane = threadIdx.x % 32;
    const int64_t own = query * lists.count + list;
    const State before = t ? state : State{{0, lists.keep ? limit : 0}, 0};
    const bool last = t + 1 == args.tiles_per_list;
    Nearest nearest(found + own * lists.capacity, lists.keep, before.nearest,
                    bins[threadIdx.x / 32]);
    int64_t within = before.within;
#pragma unroll 1  // an offer is long
    for (int i = 0; i < kTileRows; i += 32) {
      const int64_t place = (list * args.tiles_per_list + t) * kTileRows + i + lane;
      const unsigned distance = distances[i + lane];
      const bool wanted = distance < limit && args.places.hold(query, place);
      if (counts) within += __popc(__ballot_sync(simt::kAllLanes, wanted));
      nearest.offer(entry_of(wanted ? distance : kNoDistance, place), last && i + 32 == kTileRows);
    }
    __syncwarp();
    if (lane == 0) {
      state = {nearest.state(), within};
      if (last && counts) counts[own] = within;
    }
  }
};

// Takes distances of a tile: writes them all.
struct WriteDistances {
  int32_t* out;  // [queries, rows]

  struct State {};
  template <class ScanArgs>
  __device__ void take(const ScanArgs& args, int64_t query, int64_t list, int64_t t,
                       const uint16_t* distances, State&) const {
    const int64_t first = (list * args.tiles_per_list + t) * kTileRows;
    for (int i = threadIdx.x % 32; i < kTileRows; i += 32) {
      if (first + i < args.codes.count) out[query * args.codes.count + first + i] = distances[i];
    }
  }
};

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
__global__ void __launch_bounds__(kSearchThreads, 4)
    merge_lists(const uint64_t* entries, Lists from, uint64_t* merged, Lists to, int64_t queries) {
  SIMT_SHARED(unsigned, bins, [kSearchWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t own = int64_t(blockIdx.x) * kSearchWarps + warp;
  if (own >= queries * to.count) return;
  const int64_t query = own / to.count, first = own % to.count * kMergedLists;
  const int64_t left = from.count - first;
  const unsigned keep = unsigned(from.keep);
  const unsigned count = unsigned(left < kMergedLists ? left : kMergedLists) * keep;
  entries += (query * from.count + first) * from.capacity;
  Nearest nearest(merged + own * to.capacity, to.keep, {0, kNoDistance}, bins[warp]);
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
__global__ void __launch_bounds__(kSearchThreads)
    rank_entries(const uint64_t* entries, Lists list, int64_t k, const int64_t* rows,
                 int32_t* distances, int64_t* ids) {
  SIMT_SHARED(uint64_t, others, [kSearchThreads]);
  const int64_t blocks = (k + kSearchThreads - 1) / kSearchThreads;  // of a query
  const int64_t query = blockIdx.x / blocks;
  const int64_t i = blockIdx.x % blocks * kSearchThreads + threadIdx.x;
  entries += query * list.capacity;
  const uint64_t own = i < list.keep ? entries[i] : kNothing;
  int64_t rank = 0;
  for (int64_t first = 0; first < list.keep; first += kSearchThreads) {
    const int64_t left = list.keep - first;
    const int count = int(left < kSearchThreads ? left : kSearchThreads);
    if (threadIdx.x < unsigned(count)) others[threadIdx.x] = entries[first + threadIdx.x];
    __syncthreads();
    for (int o = 0; o < count; ++o) rank += others[o] < own;
    __syncthreads();
  }
  if (i >= k) return;
  // Only the end of the list and what is beyond can hold nothing: place i is free then.
  const bool found = own != kNothing;
  const int64_t at = query * k + (found ? rank : i);
  distances[at] = found ? int32_t(distance_of(own)) : INT32_MAX;
  const int64_t row = int64_t(own & ((uint64_t(1) << kRowBits) - 1));
  ids[at] = !found ? -1 : rows ? rows[row] : row;
}

}  // namespace emblas::cuda
