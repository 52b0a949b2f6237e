// Scores of real-valued queries against bit codes on a GPU; scores.h has the formula.
//
// A nibble of a code contributes one of 16 values, looked up in a table that `build_tables` makes
// once for each query: 128 bytes for each byte of a code. `scan_scores` brings the codes of a tile
// to shared memory, 32 bytes of each at a time, together with the tables of these bytes; a thread
// adds up the values of its code, in float, in order. A look-up of a warp falls into 16
// neighbouring banks, and equal addresses are one access, so there are no bank conflicts. Then each
// warp offers the scores of one query and one range of rows to its list, as in hamming_cuda.cuh.
//
// Bytes: the codes once for 1 or 2 queries of a block; the tables come from the L2 cache. Shared
// memory is the limit: a look-up of a warp for each nibble and query, 2 * bytes clocks for 32
// codes.
#pragma once

#include "binary/codes_cuda.cuh"

namespace emblas::cuda {

inline constexpr int kScoreBytes = 32;  // of each code at a time
inline constexpr int kScorePieces = kScoreBytes / 16;
inline constexpr int kTableFloats = 32;  // of a byte: low nibble, high nibble

struct ScoreScanArgs {
  CodeRows codes;
  int bytes;
  int64_t queries;
  unsigned groups;  // of queries
  int64_t tiles_per_list, lists;
  Places places;
  const float* tables;  // [queries, bytes, 32]
  const float* scale;   // [codes], or null
};

// A thread makes one entry. Grid (ceil(queries * bytes * 32 / kSearchThreads)).
__global__ void __launch_bounds__(kSearchThreads) build_tables(ScoreArgs args, int64_t queries) {
  const int64_t at = int64_t(blockIdx.x) * kSearchThreads + threadIdx.x;
  if (at >= queries * args.bytes * kTableFloats) return;
  const int entry = int(at % kTableFloats), nibble = entry % 16;
  const int64_t byte = at / kTableFloats % args.bytes;
  const float* query = args.queries + at / kTableFloats / args.bytes * args.query_stride;
  const int64_t width = (args.dim + 7) / 8;
  const int64_t first = byte % width * 8 + (entry < 16 ? 4 : 0);  // low: the later dimensions
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    const float value = first + i < args.dim ? query[first + i] : 0.0f;
    sum += nibble >> (3 - i) & 1 ? value : -value;
  }
  args.tables[at] = ldexpf(sum, -int(byte / width));  // each plane weighs half of the one before
}

__device__ inline float scores_of_word(uint32_t word, const float* tables) {
  float sum = 0;
  for (int b = 0; b < 4; ++b) {
    const uint32_t byte = word >> 8 * b & 255;
    const float* table = tables + b * kTableFloats;
    sum += table[byte & 15] + table[16 + (byte >> 4)];
  }
  return sum;
}

// Grid (groups of queries * groups of lists); blocks that run at the same time share codes.
template <int queries, int unit, class Sink>
__global__ void __launch_bounds__(kSearchThreads, 2) scan_scores(ScoreScanArgs args, Sink sink) {
  constexpr int lists = kSearchWarps / queries;  // of the block, for each query
  SIMT_SHARED(uint4, tile, [kTileRows][kScorePieces + 1]);
  SIMT_SHARED(float, tables, [queries][kScoreBytes * kTableFloats]);
  SIMT_SHARED(unsigned, distances, [kSearchWarps][kTileRows]);
  SIMT_SHARED(typename Sink::State, states, [kSearchWarps]);
  const int warp = threadIdx.x / 32;
  const int64_t first_query = int64_t(blockIdx.x % args.groups) * queries;
  const int64_t first_list = int64_t(blockIdx.x / args.groups) * lists;
  const int64_t query = first_query + warp / lists, list = first_list + warp % lists;

  for (int64_t t = 0; t < args.tiles_per_list; ++t) {
    for (int part = 0; part < lists; ++part) {
      const int64_t first_place = ((first_list + part) * args.tiles_per_list + t) * kTileRows;
      float score[queries] = {};
      for (int offset = 0; offset < args.bytes; offset += kScoreBytes) {
        const int left = args.bytes - offset;
        const int bytes = min(left, kScoreBytes);
        load_codes<unit>(args.codes, args.places, first_place, args.bytes, offset,
                         (bytes + 15) / 16, tile);
        for (int q = 0; q < queries; ++q) {
          const int64_t other = min(first_query + q, args.queries - 1);
          const float* from = args.tables + (other * args.bytes + offset) * kTableFloats;
          // Whole words of codes: what is beyond a code adds nothing.
          for (int i = threadIdx.x * 4; i < (bytes + 3) / 4 * 4 * kTableFloats;
               i += kSearchThreads * 4) {
            simt::store_16_bytes(
                &tables[q][i], i < bytes * kTableFloats ? simt::load_16_bytes(from + i) : uint4{});
          }
        }
        __syncthreads();
#pragma unroll 1  // registers
        for (int w = 0; w < (bytes + 3) / 4; ++w) {
          const uint32_t word = reinterpret_cast<const uint32_t*>(tile[threadIdx.x])[w];
          for (int q = 0; q < queries; ++q) {
            score[q] += scores_of_word(word, &tables[q][w * 4 * kTableFloats]);
          }
        }
        __syncthreads();
      }
      const float scale = args.scale ? args.scale[args.places.row(first_place + threadIdx.x)] : 1;
      for (int q = 0; q < queries; ++q) {
        distances[q * lists + part][threadIdx.x] = distance_of_score(score[q] * scale);
      }
    }
    __syncthreads();
    if (query < args.queries && list < args.lists) {
      sink.take(args, query, list, t, distances[warp], states[warp]);
    }
  }
}

}  // namespace emblas::cuda
