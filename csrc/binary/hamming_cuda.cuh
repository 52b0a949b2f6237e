// Hamming distances of codes on a GPU, a tile of 256 codes at a time, for whoever takes them: a
// sink keeps the nearest ones (nearest_cuda.cuh) or writes them all.
//
// A block compares a tile with its queries. The codes come by 16-byte loads that are contiguous
// over a warp, through shared memory, 64 bytes of each at a time; rows there are 80 bytes apart, so
// that 16-byte reads of neighbouring rows fall into different banks. The distances of a tile go to
// shared memory, from where each warp feeds them to the sink, one query and one list of rows at a
// time.
//
// `scan_codes` counts bits, a code per thread, 1 or 4 queries per block. Each list is a range of
// rows, and a block works on as many as it has warps for: a single query fills the device too.
// `scan_codes_by_mma` is for more queries, 32 per block, on tensor cores (sm_80): they count the
// bits that are set in both, |a ^ b| = |a| + |b| - 2 |a & b|.
//
// Bytes: the codes once for all queries of a block, and once from memory if the blocks of a range
// run at the same time; distances stay in the block unless the sink writes them. Counting bits (16
// words per clock and multiprocessor) is the limit from about 4 queries on, memory bandwidth below.
// A multiply of 16 codes and 8 queries by 256 bits takes 2 clocks; the codes' own bits are counted
// meanwhile, once for 32 queries.
#pragma once

#include "binary/codes_cuda.cuh"
#include "binary/nearest_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kSlabBytes = 64;  // of each code at a time
inline constexpr int kSlabPieces = kSlabBytes / 16;
inline constexpr int kMmaQueries = 32;
inline constexpr int kMmaBytes = 32;  // of a code in one multiply

struct ScanArgs {
  CodeRows queries, codes;
  int bytes;
  unsigned groups;  // of queries
  int64_t tiles_per_list, lists;
  Places places;
};

// Copies `pieces` times 16 bytes of each of the block's queries to shared memory; beyond the end
// the last one stands in.
template <int unit, int queries, int width>
__device__ inline void load_queries(const ScanArgs& args, int64_t first_query, int offset,
                                    int pieces, uint4 (&wanted)[queries][width]) {
  if (threadIdx.x >= unsigned(queries * pieces)) return;
  int64_t query = first_query + threadIdx.x / pieces;
  query = min(query, args.queries.count - 1);
  const int byte = offset + threadIdx.x % pieces * 16;
  const uint8_t* code = args.queries.data + query * args.queries.stride;
  simt::store_16_bytes(&wanted[threadIdx.x / pieces][threadIdx.x % pieces],
                       load_piece<unit>(code + byte, args.bytes - byte));
}

// Grid (groups of queries * groups of lists); blocks that run at the same time share codes.
template <int queries, int unit, class Sink>
__global__ void __launch_bounds__(kSearchThreads, 3) scan_codes(ScanArgs args, Sink sink) {
  constexpr int lists = kSearchWarps / queries;  // of the block, for each query
  SIMT_SHARED(uint4, tile, [kTileRows][kSlabPieces + 1]);
  SIMT_SHARED(uint4, wanted, [queries][kSlabPieces]);
  SIMT_SHARED(uint16_t, distances, [kSearchWarps][kTileRows]);
  SIMT_SHARED(typename Sink::State, states, [kSearchWarps]);
  const int warp = threadIdx.x / 32;
  const int64_t first_query = int64_t(blockIdx.x % args.groups) * queries;
  const int64_t first_list = int64_t(blockIdx.x / args.groups) * lists;
  const int64_t query = first_query + warp / lists, list = first_list + warp % lists;

  for (int64_t t = 0; t < args.tiles_per_list; ++t) {
    for (int part = 0; part < lists; ++part) {
      const int64_t first_place = ((first_list + part) * args.tiles_per_list + t) * kTileRows;
      int distance[queries] = {};
      int offset = 0;
      do {
        const int left = args.bytes - offset;
        const int pieces = left < kSlabBytes ? (left + 15) / 16 : kSlabPieces;
        load_codes<unit>(args.codes, args.places, first_place, args.bytes, offset, pieces, tile);
        load_queries<unit>(args, first_query, offset, pieces, wanted);
        __syncthreads();
#pragma unroll 1  // registers
        for (int p = 0; p < pieces; ++p) {
          const uint4 code = simt::load_16_bytes(&tile[threadIdx.x][p]);
          for (int q = 0; q < queries; ++q) {
            distance[q] += differing_bits(code, simt::load_16_bytes(&wanted[q][p]));
          }
        }
        offset += kSlabBytes;
        if (offset >= args.bytes) {
          for (int q = 0; q < queries; ++q) {
            distances[q * lists + part][threadIdx.x] = uint16_t(distance[q]);
          }
        }
        __syncthreads();
      } while (offset < args.bytes);
    }
    if (query < args.queries.count && list < args.lists) {
      sink.take(args, query, list, t, distances[warp], states[warp]);
    }
  }
}

// Grid (groups of 32 queries * lists).
template <int unit, class Sink>
__global__ void __launch_bounds__(kSearchThreads, 2) scan_codes_by_mma(ScanArgs args, Sink sink) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int row_tiles = kTileRows / kSearchWarps / 16;  // of a warp
  constexpr int query_tiles = kMmaQueries / 8;
  SIMT_SHARED(uint4, tile, [kTileRows][kSlabPieces + 1]);
  SIMT_SHARED(uint4, wanted, [kMmaQueries][kSlabPieces + 1]);
  // The 8 keep threads that write one row's distances for several queries in different banks.
  SIMT_SHARED(uint16_t, distances, [kMmaQueries][kTileRows + 8]);
  SIMT_SHARED(int, query_bits, [kMmaQueries]);
  SIMT_SHARED(typename Sink::State, states, [kMmaQueries]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_query = int64_t(blockIdx.x % args.groups) * kMmaQueries;
  const int64_t list = blockIdx.x / args.groups;

  for (int64_t t = 0; t < args.tiles_per_list; ++t) {
    const int64_t first_place = (list * args.tiles_per_list + t) * kTileRows;
    int both[row_tiles][query_tiles][4] = {};
    int own_bits = 0, wanted_bits = 0;  // of the thread's code, and of its query
    int offset = 0;
    do {
      const int left = args.bytes - offset;
      const int pieces = left < kSlabBytes ? (left + kMmaBytes - 1) / kMmaBytes * 2 : kSlabPieces;
      load_codes<unit>(args.codes, args.places, first_place, args.bytes, offset, pieces, tile);
      load_queries<unit>(args, first_query, offset, pieces, wanted);
      __syncthreads();
#pragma unroll 1  // registers
      for (int p = 0; p < pieces; p += 2) {
        uint32_t query[query_tiles][2];
        for (int n = 0; n < query_tiles; n += 2) {
          uint32_t two[4];
          simt::ldmatrix_x4(two, &wanted[8 * n + lane / 16 * 8 + lane % 8][p + lane / 8 % 2]);
          for (int i = 0; i < 4; ++i) query[n + i / 2][i % 2] = two[i];
        }
        for (int m = 0; m < row_tiles; ++m) {
          uint32_t code[4];
          simt::ldmatrix_x4(code, &tile[32 * warp + 16 * m + lane % 16][p + lane / 16]);
          for (int n = 0; n < query_tiles; ++n) {
            simt::mma_m16n8k256_and_popc(both[m][n], code, query[n]);
          }
        }
        for (int i = 0; i < 2; ++i) own_bits += bits_set(tile[threadIdx.x][p + i]);
        if (threadIdx.x < kMmaQueries) {
          for (int i = 0; i < 2; ++i) wanted_bits += bits_set(wanted[threadIdx.x][p + i]);
        }
      }
      offset += kSlabBytes;
      if (offset >= args.bytes && threadIdx.x < kMmaQueries) query_bits[threadIdx.x] = wanted_bits;
      __syncthreads();
    } while (offset < args.bytes);
    for (int m = 0; m < row_tiles; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + lane / 4;  // of the warp's
        const int code_bits = __shfl_sync(simt::kAllLanes, own_bits, row);
        for (int n = 0; n < query_tiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            const int q = 8 * n + 2 * (lane % 4) + i;
            const int distance = code_bits + query_bits[q] - 2 * both[m][n][2 * half + i];
            distances[q][32 * warp + row] = uint16_t(distance);
          }
        }
      }
    }
    __syncthreads();
    for (int q = warp; q < kMmaQueries && first_query + q < args.queries.count; q += kSearchWarps) {
      sink.take(args, first_query + q, list, t, distances[q], states[q]);
    }
  }
#endif
}

}  // namespace emblas::cuda
