// The scan: one layout and one loop behind every exact search over codes.
//
// Layout. Codes are rearranged, a tile that fits in L2 at a time, into blocks of 128: byte p of
// 128 codes stands side by side, so a vector holds the same dimensions of many codes, sums grow
// lane by lane, and nothing is ever added across lanes. Every query of a batch reads the tile
// before the next one is made.
//
// Sums. A code's sum is the number of bits that differ from the query (Hamming) or, for scores of
// real-valued queries, the total of one table entry of 0..127 for each nibble:
//   sum = sum over byte positions p of low_p[code[p] & 15] + high_p[code[p] >> 4]
// A table of 16 bytes lives in one register and one instruction looks up a whole vector (pshufb,
// tbl). Hamming is the table popcount(nibble ^ query nibble), or the byte-wise popcount
// instruction (AVX-512 BITALG, NEON). Sums grow in bytes, and are widened to 16 bits before a byte
// can overflow.
//
// Selection. A code whose sum is below the query's limit is offered to the caller, who may lower
// the limit; one vector comparison decides for a block, and nearly always says no.
//
// Bytes: each code is read once per batch of queries; sums are never written. Per 64 code bytes and
// query: 3 vector instructions with byte popcounts, 4 to 7 per vector with tables.
#pragma once

#include <cstdint>

namespace emblas {

inline constexpr int64_t kBlock = 128;        // codes side by side in a tile
inline constexpr int64_t kWidestScan = 8191;  // bytes: their Hamming distance fits in 16 bits
inline constexpr int kLargestEntry = 127;     // of a table: two fit in a byte
inline constexpr int64_t kTableBytes = 32;    // per byte position: low table, high table

// offer(context, query, position, sum), position counting from the first code of the tile.
using Offer = void (*)(void* context, int64_t query, int64_t position, uint32_t sum);

struct ScanArgs {
  const uint8_t* tile;  // 64-byte aligned blocks
  int64_t count, bytes;
  const uint8_t* prepared;  // [queries, bytes * width]
  int64_t queries;
  int64_t period;    // byte positions whose entries together stay below 256
  uint32_t* limits;  // [queries]; codes with a smaller sum are offered
  void* context;
  Offer offer;
};

struct RowScanArgs {
  const uint8_t* codes;
  int64_t stride, count, bytes;
  const int64_t* rows;    // [count] rows of codes; null: 0, 1, ...
  const uint64_t* query;  // whole words, the last one filled up with zeros
  uint32_t* limit;
  void* context;
  Offer offer;
};

struct ScanKernels {
  int64_t hamming_width;  // prepared bytes per code byte
  void (*prepare_hamming)(const uint8_t* query, int64_t bytes, uint8_t* prepared);
  // Codes rows[0..count), or 0..count if rows is null, to a tile of whole blocks.
  void (*interleave)(const uint8_t* codes, int64_t stride, const int64_t* rows, int64_t count,
                     int64_t bytes, uint8_t* tile);
  void (*scan_hamming)(const ScanArgs&);
  void (*scan_tables)(const ScanArgs&);
  // distances[q * stride + i] of code i of the tile
  void (*distances)(const ScanArgs&, int32_t* distances, int64_t stride);
  // least[q] is lowered to the smallest distance of query q
  void (*nearest)(const ScanArgs&, uint16_t* least);
  // Hamming without rearranging, for a query or two.
  void (*scan_rows)(const RowScanArgs&);
};

}  // namespace emblas
