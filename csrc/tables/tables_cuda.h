// Hashed tables on a GPU: what hash_bag_cuda.cu launches, on a stream (a cudaStream_t), never
// waiting. The formulas stand in tables.h.
#pragma once

#include "tables/tables.h"

namespace emblas::cuda {

struct HashedIds {
  HashFamily family;
  uint32_t seed;
  int num_hashes;           // K, 1 to kMaxHashes
  uint64_t num_embeddings;  // m, 1 to 2^32
  uint64_t reciprocal;      // Modulo::reciprocal(m)
  const int64_t* ids;       // `stride` elements apart
  int64_t stride, count;
  bool has_padding;
  int64_t padding_id;
};

// Which bag each id belongs to. An id that offsets leave outside of all bags, which only wrong ones
// do, counts for nothing.
struct BagNumbers {
  const int32_t* of;  // [ids], or null: every id is a bag of its own
  int64_t bags;
};

template <class T>
struct HashBagArgs {
  HashedIds hashed;
  const T* table;  // [m, dim], rows `row_stride` elements apart
  int64_t row_stride;
  int64_t dim;
  const Accumulator<T>* weights;  // [ids] or null
};

template <class T>
struct HashBagTableArgs {
  const int64_t* order;  // [lookups] numbers i K + j, sorted by row, equal rows by number
  int num_hashes;
  BagNumbers bags;
  const Accumulator<T>* weights;
  const T* grad_out;      // [bags, dim]
  const int32_t* bounds;  // [m + 1] row r has the places bounds[r] to bounds[r + 1] - 1 of `order`
  int64_t rows, lookups, dim;
  T* grad_table;  // [m, dim]
};

// A longer segment (a bag, or the lookups of a row) is added up in pieces of so many entries or
// more, each by a warp of its own.
inline constexpr int64_t kPieceEntries = 64;

// Rows of accumulators that the pieces of segments with `entries` entries in all need.
inline int64_t piece_rows(int64_t entries) {
  return entries < 2 * kPieceEntries ? 0 : (entries + kPieceEntries - 1) / kPieceEntries;
}

// keys [ids, K] of int64_t; or of int32_t, where m < 2^31, and then m for ids that count for
// nothing.
template <class Key>
void hash_keys(const HashedIds& hashed, const BagNumbers& bags, Key* keys, void* stream);

// numbers [ids]: the bag of each id, -1 before the first and `bags` behind the last.
void bag_numbers(const int32_t* offsets, int64_t bags, int64_t ids, int32_t* numbers, void* stream);

// bounds [rows + 1] of sorted keys: how many are below each row, and below `rows`.
void row_bounds(const int32_t* keys, int64_t lookups, int64_t rows, int32_t* bounds, void* stream);

// out [ids, dim], of every id.
template <class T>
void hash_lookup(const HashBagArgs<T>& args, T* out, void* stream);

// out [bags, dim]; offsets [bags + 1]; partial: workspace of piece_rows(ids) x dim.
template <class T>
void hash_bag(const HashBagArgs<T>& args, const int32_t* offsets, int64_t bags,
              Accumulator<T>* partial, T* out, void* stream);

// partial: workspace of piece_rows(lookups) x dim.
template <class T>
void hash_bag_grad_table(const HashBagTableArgs<T>& args, Accumulator<T>* partial, void* stream);

// grad_weights [ids]; args.weights is not read.
template <class T>
void hash_bag_grad_weights(const HashBagArgs<T>& args, const BagNumbers& bags, const T* grad_out,
                           Accumulator<T>* grad_weights, void* stream);

}  // namespace emblas::cuda
