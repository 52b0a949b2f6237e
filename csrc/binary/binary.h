// Bit codes and exact Hamming search.
//
// A code holds one bit per dimension, bit = value > 0; bit 7 of byte 0 is dimension 0 (numpy's
// packbits), tail bits are 0. The Hamming distance of two codes is the number of differing bits.
//
// Search: for each query the k codes of smallest distance, ascending distance, then ascending row.
// A tile of codes is rearranged once, word w of kLanes codes side by side, and then serves every
// query: a vector holds the same word of several codes, so distances add up lane by lane and no
// horizontal sum is needed. A code is offered to a query's candidates only if it is below their
// limit, which one vector comparison decides for a whole block.
//
// Bytes: codes are read once per call and thread, whatever the number of queries; distances are
// never written. One query is bound by memory bandwidth, a batch by the popcount instructions.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// Candidates are ordered as one integer, distance above row: ascending distance, then row.
inline constexpr int kRowBits = 40;
inline constexpr uint64_t kNoLimit = uint64_t(1) << 62;

// The best codes of one query so far, unordered. Rows arrive in ascending order, so once k are
// known a code as far as the k-th can't enter any more: only distances below `limit` are offered.
struct Candidates {
  uint64_t* keys;  // [capacity], distance << kRowBits | row
  int64_t count;
  int64_t capacity;  // > k
  int64_t k;
  uint64_t limit;
};

struct HammingKernels {
  int64_t block;  // codes that lie side by side in a tile
  // The query as whole words, the last one filled up with zeros.
  void (*prepare)(const uint8_t* query, int64_t bytes, uint64_t* prepared);
  // Rearranges `count` codes; the tile is 64-byte aligned and holds a multiple of `block` codes.
  void (*arrange)(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes,
                  uint64_t* tile);
  // Offers the tile's codes, whose first is row `first_row`, to every query's candidates. `tighten`
  // is called on a full list: it keeps the best k and sets the limit.
  void (*scan)(const uint64_t* tile, int64_t count, int64_t first_row, int64_t words,
               const uint64_t* prepared, int64_t queries, Candidates* candidates,
               void (*tighten)(Candidates&));
  // The same for one query and codes that are not rearranged.
  void (*scan_rows)(const uint8_t* codes, int64_t stride, int64_t count, int64_t first_row,
                    int64_t bytes, const uint64_t* prepared, Candidates& candidates,
                    void (*tighten)(Candidates&));
};

template <class T>
struct PackSign {
  // Rows [first, last) of x, `row_stride` elements apart, to codes of ceil(dim / 8) bytes. The
  // threshold is one value per dimension, or null for 0.
  void (*pack)(const T* x, int64_t row_stride, const Accumulator<T>* threshold, int64_t dim,
               int64_t first, int64_t last, uint8_t* codes);
};
using PackSignKernels = ByDtype<PackSign>;

// A random rotation in dim * log2(dim) steps, x -> H D_r ... H D_1 x: round t flips the signs D_t
// and applies the normalized Hadamard matrix H to the largest power of two of dimensions that fits,
// the first ones in even rounds and the last ones in odd rounds. Orthogonal for any dimension.
template <class T>
struct HadamardRotateArgs {
  const T* x;
  int64_t row_stride, dim;
  const int8_t* signs;  // [rounds, dim], +1 or -1
  int64_t rounds;
  bool inverse;  // the transpose: the rounds backwards
  T* out;        // [rows, dim]
};
template <class T>
struct HadamardRotate {
  // `buffer` holds dim values and belongs to the calling thread.
  void (*rotate)(const HadamardRotateArgs<T>&, int64_t first, int64_t last, Accumulator<T>* buffer);
};
using HadamardRotateKernels = ByDtype<HadamardRotate>;

}  // namespace emblas
