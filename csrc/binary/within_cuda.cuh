// All rows within a radius on a GPU, however many: two scans, between which the host learns how
// much memory they need.
//
// The first scan counts what each list (a query and a range of rows) finds, `begin_lists` makes of
// that where each list begins, and the second scan writes entries there, in ascending order of
// rows. `sort_found` then orders each query's entries by distance: a stable sort by digits of five
// bits, least first, so rows stay in order among equals. Nothing depends on the order in which
// threads run.
//
// Bytes: the codes twice; 8 for each row found, written by the scan, and read twice and written
// once by each digit (1 up to a radius of 31, 2 up to 1023, else 3).
#pragma once

#include "binary/nearest_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kDigitBits = 5;  // a digit's bins are the lanes of a warp

// Takes distances of a tile: counts those below the limit, or writes them to where the list begins.
struct TakeWithin {
  unsigned limit;
  int64_t lists;    // of each query
  int64_t* counts;  // [queries, lists]: what each found; with `found`, where each begins
  uint64_t* found;  // or null

  struct State {
    int64_t next;
  };
  template <class ScanArgs>
  __device__ void take(const ScanArgs& args, int64_t query, int64_t list, int64_t t,
                       const uint16_t* distances, State& state) const {
    const int lane = threadIdx.x % 32;
    const int64_t own = query * lists + list;
    int64_t next = t ? state.next : found ? counts[own] : 0;
    for (int i = lane; i < kTileRows; i += 32) {
      const int64_t place = (list * args.tiles_per_list + t) * kTileRows + i;
      const unsigned distance = distances[i];
      const bool wanted = distance < limit && args.places.hold(query, place);
      const unsigned lanes = __ballot_sync(simt::kAllLanes, wanted);
      if (found && wanted) found[next + count_before(lanes)] = entry_of(distance, place);
      next += __popc(lanes);
    }
    __syncwarp();
    if (lane > 0) return;
    state.next = next;
    if (!found && t + 1 == args.tiles_per_list) counts[own] = next;
  }
};

// From how many each of `count` lists found to where it begins, in place; offsets [queries + 1] are
// where each query begins. One block.
__global__ void __launch_bounds__(kSearchThreads)
    begin_lists(int64_t* counts, int64_t lists, int64_t queries, int64_t* offsets) {
  SIMT_SHARED(int64_t, of_warp, [kSearchWarps]);
  const int thread = threadIdx.x, warp = thread / 32;
  int64_t total = 0;  // of the lists before the tile
  for (int64_t first = 0; first < lists * queries; first += kSearchThreads) {
    const int64_t list = first + thread;
    const bool exists = list < lists * queries;
    const int64_t own = exists ? counts[list] : 0;
    const int64_t through = sum_through(own);
    if (thread % 32 == 31) of_warp[warp] = through;
    __syncthreads();
    int64_t begin = total + through - own;
    for (int w = 0; w < kSearchWarps; ++w) {
      if (w < warp) begin += of_warp[w];
      total += of_warp[w];
    }
    if (exists) {
      counts[list] = begin;
      if (list % lists == 0) offsets[list / lists] = begin;
    }
    __syncthreads();
  }
  for (int64_t q = thread; q <= queries; q += kSearchThreads) {
    if (q == queries || lists == 0) offsets[q] = total;
  }
}

// A warp sorts the entries of a query and writes them as results; `rows` translates if given. Grid
// (ceil(queries / kSearchWarps)).
__global__ void __launch_bounds__(kSearchThreads)
    sort_found(uint64_t* from, uint64_t* to, const int64_t* offsets, int64_t queries, int digits,
               const int64_t* rows, int32_t* distances, int64_t* ids) {
  SIMT_SHARED(unsigned, bins_of_warp, [kSearchWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t query = int64_t(blockIdx.x) * kSearchWarps + warp;
  if (query >= queries) return;
  unsigned (&bins)[32] = bins_of_warp[warp];  // of a digit: where its next entry goes
  const int64_t begin = offsets[query], count = offsets[query + 1] - begin;
  from += begin;
  to += begin;
  for (int digit = 0; digit < digits; ++digit) {
    const auto digit_of = [&](uint64_t entry) {
      return distance_of(entry) >> digit * kDigitBits & 31;
    };
    bins[lane] = 0;
    __syncwarp();
    for (int64_t i = lane; i < count; i += 32) atomicAdd(&bins[digit_of(from[i])], 1u);
    __syncwarp();
    const unsigned own = bins[lane];
    bins[lane] = sum_through(own) - own;
    __syncwarp();
    for (int64_t first = 0; first < count; first += 32) {
      const bool exists = first + lane < count;
      const uint64_t entry = exists ? from[first + lane] : kNothing;
      const unsigned value = digit_of(entry);
      unsigned equal = __ballot_sync(simt::kAllLanes, exists);  // lanes with the same digit
      for (int bit = 0; bit < kDigitBits; ++bit) {
        const unsigned set = __ballot_sync(simt::kAllLanes, value >> bit & 1);
        equal &= value >> bit & 1 ? set : ~set;
      }
      const unsigned at = bins[value] + count_before(equal);
      __syncwarp();
      if (exists) {
        if (equal >> lane == 1) bins[value] = at + 1;  // the last of them
        if (digit + 1 < digits) {
          to[at] = entry;
        } else {
          const int64_t row = int64_t(entry & 0xffffffffu);
          distances[begin + at] = int32_t(distance_of(entry));
          ids[begin + at] = rows ? rows[row] : row;
        }
      }
      __syncwarp();
    }
    uint64_t* const sorted = to;
    to = from;
    from = sorted;
  }
}

}  // namespace emblas::cuda
