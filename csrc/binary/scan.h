// The scan: one layout and one loop behind every exact search over codes.
//
// Layout. Codes are rearranged, a tile that fits in L2 at a time, into blocks of 128: byte p of
// 128 codes stands side by side, so a vector holds the same dimensions of many codes, sums grow
// lane by lane, and nothing is ever added across lanes. Every query of a batch reads the tile
// before the next one is made.
//
// Sums. A code's sum is the number of bits that differ from the query (Hamming) or, for scores of
// real-valued queries, the total of one table entry for each field of a few bits:
//   sum = sum over fields f of table_f[the bits of field f]
// A table of 16 bytes lives in one register and one instruction looks up a whole vector (pshufb,
// tbl): two fields of 4 bits to a byte. AVX-512 VBMI has tables of 64 bytes (vpermb), so three
// bytes make four fields: the low 6 bits of each, which cost nothing to cut out, and the 2 high
// bits of all three, cut out once for all queries of a tile. Hamming is the table popcount(nibble ^
// query nibble), or the byte-wise popcount instruction (AVX-512 BITALG, NEON). Sums grow in bytes,
// and are widened to 16 bits before a byte can overflow.
//
// A single query doesn't earn the rearranging back. It reads codes as they lie: differing bits are
// counted by 64-bit words, and a score's weights rounded to 4 binary digits, each of which keeps
// some of the differing bits. That is coarser than tables, so more codes are scored in vain, but
// few.
//
// Selection. A code whose sum is below the query's limit is offered to the caller, who may lower
// the limit; one vector comparison decides for a block, and nearly always says no.
//
// Bytes: each code is read once per batch of queries, the next tile's while one is scanned; sums
// are never written. Per 64 code bytes and query: 3 vector instructions with byte popcounts (1.5
// cycles of Zen 4, where carry-save adders before the popcounts save nothing: each takes two
// instructions and saves one popcount and one addition), 2.7 with tables of 64, 4 with tables
// of 16.
#pragma once

#include <cstdint>

namespace emblas {

inline constexpr int64_t kBlock = 128;            // codes side by side in a tile
inline constexpr int64_t kWidestScan = 8191;      // bytes: their Hamming distance fits in 16 bits
inline constexpr int64_t kRowPlanes = 4;          // digits of a weight
inline constexpr int64_t kWidestWeighted = 512;   // bytes: their weights add up in 16 bits
inline constexpr int64_t kPastTile = 2 * kBlock;  // bytes after a tile that may be read in vain

// The tables of a group of byte positions, whose entries together fit in a byte.
struct TableLayout {
  int64_t bits;    // of a field; its table has 2^bits entries
  int64_t bytes;   // of a code that a group covers
  int64_t tables;  // of a group

  int64_t groups(int64_t code_bytes) const { return (code_bytes + bytes - 1) / bytes; }
  int64_t prepared(int64_t code_bytes) const {
    return groups(code_bytes) * tables * (int64_t(1) << bits);
  }
  // The bit of a code, counted from the lowest of byte 0, that is bit i of the index into a table.
  int64_t bit(int64_t table, int64_t i) const {
    const int64_t first = table / tables * bytes, within = table % tables;
    if (bits == 4) return 8 * first + 4 * within + i;
    return within < 3 ? 8 * (first + within) + i : 8 * (first + i / 2) + 6 + i % 2;
  }
};

// Codes of a tile: rows[0..count) of all codes, or 0..count if rows is null.
struct Rows {
  const uint8_t* codes;
  int64_t stride;
  const int64_t* rows;
  int64_t count;

  const uint8_t* at(int64_t i) const { return codes + (rows ? rows[i] : i) * stride; }
};

// 64-bit words of a query of the scan by rows: whole vectors of 64 bytes.
inline int64_t row_words(int64_t bytes) { return (bytes + 63) / 64 * 8; }

// offer(context, query, position, sum), position counting from the first code of the tile.
using Offer = void (*)(void* context, int64_t query, int64_t position, uint32_t sum);

struct ScanArgs {
  const uint8_t* tile;  // 64-byte aligned blocks
  int64_t count, bytes;
  const uint8_t* prepared;  // [queries, of hamming_width or of the table layout]
  int64_t queries;
  // Ends of runs of table groups whose entries together fit in a byte; unused for Hamming.
  const int64_t* runs;
  uint8_t* highest;  // [groups, codes] for scan_tables, 64-byte aligned; unused for Hamming
  Rows next;         // of the next tile, to be fetched meanwhile
  uint32_t* limits;  // [queries]; codes with a smaller sum are offered
  void* context;
  Offer offer;
};

// The scan of codes as they lie, for a query or two. A code's sum is the number of bits that differ
// from the query or, with planes of masks, the sum of the differing bits' weights, which are small
// integers, the planes their binary digits, the highest first.
struct RowScanArgs {
  Rows rows;
  int64_t bytes;
  const uint64_t* query;  // [1 + planes, row_words(bytes)], filled up with zeros
  int64_t planes;         // 0 or kRowPlanes
  uint32_t* limit;
  void* context;
  Offer offer;
};

struct ScanKernels {
  int64_t hamming_width;  // prepared bytes per code byte
  void (*prepare_hamming)(const uint8_t* query, int64_t bytes, uint8_t* prepared);
  TableLayout tables;
  // To a tile of whole blocks.
  void (*interleave)(const Rows& rows, int64_t bytes, uint8_t* tile);
  void (*scan_hamming)(const ScanArgs&);
  void (*scan_tables)(const ScanArgs&);
  // distances[q * stride + i] of code i of the tile
  void (*distances)(const ScanArgs&, int32_t* distances, int64_t stride);
  // least[q] is lowered to the smallest distance of query q
  void (*nearest)(const ScanArgs&, uint16_t* least);
};
struct RowScanKernels {
  void (*scan_rows)(const RowScanArgs&);
  int64_t planes;  // that it takes
};

}  // namespace emblas
