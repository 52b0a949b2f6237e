// Hamming distances of codes on a GPU, and the nearest of them.
//
// A block compares tiles of 256 codes with 1, 4 or 8 queries, one code per thread. The codes come
// by 16-byte loads that are contiguous over a warp, through shared memory, 64 bytes of each at a
// time; rows there are 80 bytes apart, so that 16-byte reads of neighbouring rows fall into
// different banks. Queries are read from shared memory by all threads at once. Then each of the 8
// warps offers the distances of one query and one range of rows to its list (nearest_cuda.cuh):
// with one query a block works on 8 ranges, so a single query fills the device as well.
//
// Bytes: the codes once for all queries of a block, and once from memory if the blocks of a range
// run at the same time; distances never leave the block. Counting bits (16 words per clock and
// multiprocessor) is the limit from about 4 queries on, memory bandwidth below.
#pragma once

#include "binary/nearest_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kSlabBytes = 64;  // of each code at a time
inline constexpr int kSlabPieces = kSlabBytes / 16;

// `valid` (above 0) bytes of a code, filled up with zeros to 16. `unit`: what address, stride and
// width are multiples of, 16, 4 or 1.
template <int unit>
__device__ inline uint4 load_piece(const uint8_t* from, int valid) {
  if constexpr (unit == 16) {
    return simt::load_16_bytes(from);
  } else {
    uint32_t words[4] = {};
    if constexpr (unit == 4) {
      for (int i = 0; i < 4; ++i) {
        if (4 * i < valid) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
    } else {
      for (int i = 0; i < 16; ++i) {
        if (i < valid) words[i / 4] |= uint32_t(from[i]) << i % 4 * 8;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
}

__device__ inline int differing_bits(const uint4& a, const uint4& b) {
  return __popc(a.x ^ b.x) + __popc(a.y ^ b.y) + __popc(a.z ^ b.z) + __popc(a.w ^ b.w);
}

struct ScanArgs {
  CodeRows queries, codes;
  int bytes;
  RowFilter filter;
  int64_t places;   // of codes or, where there are ids, of those
  unsigned limit;   // only distances below are found
  unsigned groups;  // of queries
  int64_t tiles_per_list;
  Lists lists;
  uint64_t* found;  // [queries, lists.count, lists.capacity]
};

// The row at a place; beyond the end another row stands in.
__device__ inline int64_t row_at(const ScanArgs& args, int64_t place) {
  place = place < args.places ? place : args.places - 1;
  if (!args.filter.ids) return place;
  const int64_t id = args.filter.ids[place];
  return id < 0 ? 0 : id < args.codes.count ? id : args.codes.count - 1;
}
__device__ inline bool may_be_found(const ScanArgs& args, int64_t query, int64_t place) {
  if (query >= args.queries.count || place >= args.places) return false;
  if (!args.filter.bitmaps) return true;
  const uint8_t byte = args.filter.bitmaps[query * args.filter.bitmap_stride + place / 8];
  return byte >> (7 - place % 8) & 1;
}

// Grid (groups of queries * groups of lists).
template <int queries, int unit>
__global__ void __launch_bounds__(kSearchThreads, queries == 8 ? 2 : 3) scan_codes(ScanArgs args) {
  constexpr int lists = kSearchWarps / queries;  // of the block, for each query
  static_assert(kTileRows == kSearchThreads);
  SIMT_SHARED(uint4, tile, [kTileRows][kSlabPieces + 1]);
  SIMT_SHARED(uint4, wanted, [queries][kSlabPieces]);
  SIMT_SHARED(uint16_t, distances, [kSearchWarps][kTileRows]);
  SIMT_SHARED(unsigned, bins, [kSearchWarps][32]);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // Blocks that run at the same time share codes.
  const int64_t first_query = int64_t(blockIdx.x % args.groups) * queries;
  const int64_t first_list = int64_t(blockIdx.x / args.groups) * lists;
  const int64_t own_query = first_query + warp / lists, own_list = first_list + warp % lists;
  const bool busy = own_query < args.queries.count && own_list < args.lists.count;
  Nearest nearest(args.found + (own_query * args.lists.count + own_list) * args.lists.capacity,
                  args.lists.keep, args.limit, bins[warp]);

  for (int64_t t = 0; t < args.tiles_per_list; ++t) {
    for (int part = 0; part < lists; ++part) {
      const int64_t first_place = ((first_list + part) * args.tiles_per_list + t) * kTileRows;
      int distance[queries] = {};
      int offset = 0;
      do {
        const int left = args.bytes - offset;
        const int pieces = left < kSlabBytes ? (left + 15) / 16 : kSlabPieces;
        uint4 piece[kSlabPieces];
        for (int j = 0; j < kSlabPieces; ++j) {
          if (j >= pieces) continue;
          const int at = thread + j * kSearchThreads, byte = at % pieces * 16;
          const int64_t row = row_at(args, first_place + at / pieces);
          const uint8_t* code = args.codes.data + row * args.codes.stride + offset;
          piece[j] = load_piece<unit>(code + byte, left - byte);
        }
        for (int j = 0; j < kSlabPieces; ++j) {
          if (j >= pieces) continue;
          const int at = thread + j * kSearchThreads;
          simt::store_16_bytes(&tile[at / pieces][at % pieces], piece[j]);
        }
        if (thread < queries * pieces) {
          int64_t query = first_query + thread / pieces;
          query = query < args.queries.count ? query : args.queries.count - 1;
          const int byte = thread % pieces * 16;
          const uint8_t* code = args.queries.data + query * args.queries.stride + offset;
          simt::store_16_bytes(&wanted[thread / pieces][thread % pieces],
                               load_piece<unit>(code + byte, left - byte));
        }
        __syncthreads();
#pragma unroll 1  // registers
        for (int p = 0; p < pieces; ++p) {
          const uint4 code = simt::load_16_bytes(&tile[thread][p]);
          for (int q = 0; q < queries; ++q) {
            distance[q] += differing_bits(code, simt::load_16_bytes(&wanted[q][p]));
          }
        }
        offset += kSlabBytes;
        if (offset >= args.bytes) {
          const int64_t place = first_place + thread;
          for (int q = 0; q < queries; ++q) {
            const bool wanted = may_be_found(args, first_query + q, place);
            distances[q * lists + part][thread] = uint16_t(wanted ? distance[q] : kNoDistance);
          }
        }
        __syncthreads();
      } while (offset < args.bytes);
    }
    if (!busy) continue;
    const int64_t first_place = (own_list * args.tiles_per_list + t) * kTileRows;
#pragma unroll 1  // an offer is long
    for (int i = 0; i < kTileRows; i += 32) {
      nearest.offer(entry_of(distances[warp][i + lane], first_place + i + lane),
                    t + 1 == args.tiles_per_list && i + 32 == kTileRows);
    }
  }
}

}  // namespace emblas::cuda
