// Hashed embedding tables: ids of an unbounded vocabulary share the rows of a small table.
//
//   row_j(id) = key_j(id) mod m,  j = 0 .. K - 1          the K rows of an id (they may coincide)
//   e(id)     = ((E[row_0] + E[row_1]) + ...)             its embedding
//   out_b     = sum_{i in bag b} w_i e(id_i)              w_i = 1 if none; zero if the bag is empty
//
// Backward, g_b = d loss / d out_b, bag b holding i:
//   dE[r]     = sum_i sum_{j: row_j(id_i) = r} w_i g_b    added by rising i: the same bits always
//   dw_i      = e(id_i) . g_b
//
// The 32-bit keys. murmur3: the four words of MurmurHash3_x64_128 of the id's eight bytes (the keys
// of thinc's and spaCy's HashEmbed); keys 4 to 7 come from seed + 1, and so on. splitmix64: the low
// and high halves of the successive outputs of that generator, started at id xor mix(seed).
//
// Bytes: forward reads ids and the distinct rows in use, and writes out; keys never reach memory. A
// table that fits a cache is bound by the loads of K rows per id, a larger one by memory latency,
// which prefetching hides. Backward for the table: each task owns a range of rows, passes over the
// row numbers of all ids (stored once, 4 K bytes per id) and adds up those in its range, reading
// grad_out in order. So a row is always added up by one thread, in the order of the ids, and the
// bits don't depend on how the rows were split.
#pragma once

#include <cstdint>

#include "common/hash.h"
#include "common/types.h"

namespace emblas {

enum class HashFamily : int64_t { murmur3, splitmix64 };
inline constexpr int64_t kHashFamilies = 2;
inline constexpr int64_t kMaxHashes = 16;

namespace {

// Keys 4 * group to 4 * group + 3, as the four 32-bit words from low to high.
template <class U>
EMBLAS_HOST_DEVICE inline Hash128<U> four_keys(HashFamily family, uint32_t seed, U id, int group) {
  if (family == HashFamily::murmur3) return murmur3(id, seed + uint32_t(group));
  const U state = (id ^ splitmix64_mix(uint64_t(seed))) + 2 * group * kSplitmixStep;
  return {splitmix64_mix(state + kSplitmixStep), splitmix64_mix(state + 2 * kSplitmixStep)};
}

}  // namespace

struct HashedIds {
  HashFamily family;
  uint32_t seed;
  int64_t num_hashes;       // K, 1 to kMaxHashes
  uint64_t num_embeddings;  // m, 1 to 2^32
  const int64_t* ids;       // 64-bit patterns, `stride` elements apart
  int64_t stride;
  const int64_t* padding_id;  // contributes nothing and gets no gradient; null for none
};

template <class T>
struct HashBagArgs {
  HashedIds hashed;
  const T* table;  // [m, dim], rows `row_stride` elements apart
  int64_t row_stride;
  int64_t dim;
  const int32_t* offsets;         // [bags + 1], or null: every id is a bag of its own
  const Accumulator<T>* weights;  // [ids] or null
};

template <class T>
struct HashBagTableArgs {
  HashedIds hashed;
  const uint32_t* rows;  // [ids, K]
  int64_t bags, dim;
  const int32_t* offsets;
  const Accumulator<T>* weights;
  const T* grad_out;  // [bags, dim]
  T* grad_table;      // [m, dim]
};

template <class T>
struct HashBag {
  // out [bags, dim] for the bags [first, last); scratch holds dim accumulators.
  void (*forward)(const HashBagArgs<T>&, int64_t first, int64_t last, Accumulator<T>* scratch,
                  T* out);
  // grad_weights [ids] for the bags [first, last).
  void (*grad_weights)(const HashBagArgs<T>&, int64_t first, int64_t last, const T* grad_out,
                       Accumulator<T>* grad_weights);
  // Rows [first, last) of grad_table; scratch holds as many rows of accumulators for 16-bit T and
  // is not used otherwise.
  void (*grad_table)(const HashBagTableArgs<T>&, int64_t first, int64_t last,
                     Accumulator<T>* scratch);
};

struct TablesKernels {
  // Row numbers [ids, K] of the ids [first, last).
  void (*hash_keys)(const HashedIds&, int64_t first, int64_t last, int64_t* keys);
  void (*hash_rows)(const HashedIds&, int64_t first, int64_t last, uint32_t* rows);
  ByDtype<HashBag> hash_bag;
};

}  // namespace emblas
