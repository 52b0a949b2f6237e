// The nearest rows on a GPU: lists that one warp each fills.
//
// Results are ordered by distance, a number of up to 32 bits, and then by row, so one number says
// it all: an entry is the distance above 32 bits of row. Scores become distances that order the
// same. A list is offered rows in ascending order. It appends those that are nearer than its limit,
// and when it has grown by kListSlack it shrinks to the `keep` nearest: histograms of five bits at
// a time give the distance of the last one kept, which is the new limit (a later row at that
// distance comes after `keep` others). After the first few hundred rows hardly any row passes the
// limit, so a row costs one comparison. Nothing depends on the order in which threads run.
//
// Bytes: 8 for each entry kept, written once; list memory stays in the L2 cache.
#pragma once

#include "binary/binary_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline constexpr int kHammingBits = 15;  // of distances of codes up to kMaxCodeBytes
inline constexpr int kScoreBits = 32;
inline constexpr int kSearchWarps = 8;
inline constexpr int kSearchThreads = 32 * kSearchWarps;
inline constexpr uint64_t kNothing = ~uint64_t(0);  // fills a list that found too few
inline constexpr unsigned kNoDistance = ~0u;        // of a row that is not to be found

__device__ inline unsigned distance_of(uint64_t entry) { return unsigned(entry >> 32); }
__device__ inline uint64_t entry_of(unsigned distance, int64_t row) {
  return uint64_t(distance) << 32 | uint64_t(row);
}

// How many of the lanes that are set come before the own one.
__device__ inline unsigned count_before(unsigned lanes) {
  return __popc(lanes & ((1u << threadIdx.x % 32) - 1));
}

// Sum over the lanes up to the own one.
template <class A>
__device__ inline A sum_through(A x) {
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const A others = __shfl_up_sync(simt::kAllLanes, x, step);
    if (lane >= step) x += others;
  }
  return x;
}

struct ListState {
  int count;
  unsigned limit;  // only distances below are found
};

// A list and its state, held by the 32 lanes of a warp, which call everything together. Distances
// have `bits`.
template <int bits>
class Nearest {
 public:
  // `bins` is shared memory of this warp.
  __device__ Nearest(uint64_t* list, int keep, ListState state, unsigned (&bins)[32])
      : list_(list),
        bins_(bins),
        keep_(keep),
        count_(state.count),
        limit_(state.limit),
        lane_(threadIdx.x % 32) {}
  __device__ ListState state() const { return {count_, limit_}; }

  // Each lane offers one entry; entries come in ascending order of rows, over lanes and calls. The
  // last call leaves `keep` entries in this order, kNothing at the end if they are too few.
  __device__ __forceinline__ void offer(uint64_t entry, bool last) {
    const bool nearer = distance_of(entry) < limit_;
    const unsigned found = __ballot_sync(simt::kAllLanes, nearer);
    if (nearer) list_[count_ + count_before(found)] = entry;
    count_ += __popc(found);
    if (count_ > keep_ + (last ? 0 : kListSlack - 32)) shrink();
    if (!last) return;
    for (int i = count_ + lane_; i < keep_; i += 32) list_[i] = kNothing;
  }

 private:
  __device__ __forceinline__ void shrink() {
    // The keep-th smallest distance, five bits at a time; `ties` of the entries at it are kept.
    unsigned last = 0, ties = unsigned(keep_);
    for (int shift = (bits - 1) / 5 * 5; shift >= 0; shift -= 5) {
      bins_[lane_] = 0;
      __syncwarp();
      for (int i = lane_; i < count_; i += 32) {
        const unsigned distance = distance_of(list_[i]);
        if (distance >> shift >> 5 == last) atomicAdd(&bins_[distance >> shift & 31], 1u);
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
      const bool keep = distance < last || (distance == last && count_before(equal) < ties);
      const unsigned passed = __popc(equal);
      ties -= min(passed, ties);
      const unsigned lanes = __ballot_sync(simt::kAllLanes, keep);
      __syncwarp();
      if (keep) list_[kept + count_before(lanes)] = entry;
      kept += __popc(lanes);
    }
    count_ = keep_;
  }

  // The bin that holds the wanted-th entry (from 1); leaves its number within the bin.
  __device__ __forceinline__ unsigned bin_of(unsigned& wanted) const {
    const unsigned own = bins_[lane_];
    const unsigned through = sum_through(own);
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
    place = min(place, count - 1);
    if (!filter.ids) return place;
    const int64_t id = filter.ids[place];
    return min(max(id, int64_t(0)), rows - 1);
  }
  __device__ bool hold(int64_t query, int64_t place) const {
    if (place >= count) return false;
    const int64_t row = filter.ids ? filter.ids[place] : place;
    if (row < 0 || row >= rows || (later_only && row <= query)) return false;
    if (!filter.bitmaps) return true;
    const uint8_t byte = filter.bitmaps[query * filter.bitmap_stride + place / 8];
    return byte >> (7 - place % 8) & 1;
  }
};

// Takes distances of a tile, for one query and one list of `tiles_per_list` tiles: keeps the
// nearest and counts.
template <int bits>
struct KeepNearest {
  Lists lists;
  unsigned limit;   // only distances below count
  uint64_t* found;  // [queries, lists.count, lists.capacity]
  int64_t* counts;  // [queries, lists.count], or null

  struct State {
    ListState nearest;
    int64_t within;
  };
  template <class ScanArgs, class Distance>
  __device__ void take(const ScanArgs& args, int64_t query, int64_t list, int64_t t,
                       const Distance* distances, State& state) const {
    SIMT_SHARED(unsigned, bins, [kSearchWarps][32]);
    const int lane = threadIdx.x % 32;
    const int64_t own = query * lists.count + list;
    const State before = t ? state : State{{0, lists.keep ? limit : 0}, 0};
    const bool last = t + 1 == args.tiles_per_list;
    Nearest<bits> nearest(found + own * lists.capacity, lists.keep, before.nearest,
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

// A distance, or the score that `distance_of_score` made one.
template <class Value>
__device__ inline Value value_of(unsigned distance);
template <>
__device__ inline int32_t value_of<int32_t>(unsigned distance) {
  return distance == kNoDistance ? INT32_MAX : int32_t(distance);
}
template <>
__device__ inline float value_of<float>(unsigned distance) {
  if (distance == kNoDistance) return -INFINITY;
  const uint32_t bits = distance >> 31 ? distance : ~distance & 0x7fffffffu;
  float score;
  memcpy(&score, &bits, 4);
  return score;
}
// Ascending where scores descend; NaN comes last, -0 ties with 0.
__device__ inline unsigned distance_of_score(float score) {
  score = score == score ? score + 0.0f : -INFINITY;
  uint32_t bits;
  memcpy(&bits, &score, 4);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

}  // namespace emblas::cuda
