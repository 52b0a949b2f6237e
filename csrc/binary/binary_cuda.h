// Bit codes on a GPU: what the .cu files of this folder launch on a stream (a cudaStream_t), never
// waiting. Codes are laid out as binary.h says; what the kernels do stands in the .cuh files.
#pragma once

#include <cstdint>
#include <type_traits>

#include "binary/binary.h"

namespace emblas::cuda {

template <class T>
struct PackSignArgs {
  const T* x;  // [rows, dim], rows `row_stride` elements apart
  int64_t row_stride;
  int64_t rows;
  int64_t dim;                      // below 2^31
  const Accumulator<T>* threshold;  // [dim], or null for 0
  uint8_t* codes;                   // [rows, ceil(dim / 8)]
};
template <class T>
void pack_sign(const PackSignArgs<T>& args, void* stream);

template <class T>
void unpack_planes(const UnpackPlanesArgs<T>& args, void* stream);

inline constexpr int64_t kRotateBytes = 48 << 10;  // of a row in accumulators: shared memory

template <class T>
void hadamard_rotate(const HadamardRotateArgs<T>& args, int64_t rows, void* stream);

// Rows of codes, `stride` bytes apart.
struct CodeRows {
  const uint8_t* data;
  int64_t stride;
  int64_t count;
};

inline constexpr int64_t kMaxCodeBytes = 4095;               // a distance has 15 bits
inline constexpr int64_t kMaxResults = int64_t(1) << 27;     // k, so that an index has 32 bits
inline constexpr int64_t kMaxRows = (int64_t(1) << 32) - 1;  // a row has 32 bits
inline constexpr int kTileRows = 256;                        // rows that a block compares at once
inline constexpr int kMergedLists = 16;                      // lists that become one
inline constexpr int kListSlack = 256;  // a list grows by so much, then shrinks

// Lists of the rows found, one for each query and each range of `rows_per_list` rows.
struct Lists {
  int64_t count;     // of each query
  int keep;          // entries of each that are used in the end
  int64_t capacity;  // entries from one list to the next
};

// How a search is cut, from shapes alone.
struct SearchPlan {
  int queries_per_block;  // which share a pass over the codes: 1 to 4, or 32 on tensor cores
  int64_t tiles_per_list;
  Lists lists;

  int64_t rows_per_list() const { return tiles_per_list * kTileRows; }
  // A warp of a block takes one query and one list at a time.
  int lists_per_block() const { return queries_per_block < 8 ? 8 / queries_per_block : 1; }
};
// `blocks`: how many fill the device.
SearchPlan plan_search(int64_t queries, int64_t rows, int64_t k, int64_t blocks,
                       int queries_per_block);
// `tensor_cores`: use them where the device has them.
int hamming_queries_per_block(int64_t queries, bool tensor_cores);
inline int score_queries_per_block(int64_t queries) { return queries == 1 ? 1 : 2; }
// The lists that `lists` become in one merge.
Lists merged_lists(const Lists& lists, int64_t k);

struct Workspaces {  // entries of 8 bytes
  int64_t lists;     // also the lists after two merges, four merges...
  int64_t merged;    // the lists after one merge, three merges...
};
Workspaces search_workspaces(const SearchPlan& plan, int64_t queries, int64_t k);

// Which rows may be found: all, those whose bit is set, or those that are listed.
struct RowFilter {
  const uint8_t* bitmaps;  // bit 7 of byte 0 is row 0; or null
  int64_t bitmap_stride;   // bytes to the next query's, 0 if all queries share one
  const int64_t* ids;      // ascending, but for those that are no rows; or null
  int64_t id_count;
};

// What all searches share.
struct Search {
  int64_t queries;
  int64_t rows;
  int64_t k;        // 0 only counts
  bool later_only;  // only rows after the query's own number
  RowFilter filter;
  SearchPlan plan;  // for as many rows as there are places
  uint64_t* lists;
  uint64_t* merged;
  int64_t* list_counts;  // workspace [queries, plan.lists.count], or null
  int64_t* ids;          // [queries, k]
  int64_t* counts;       // [queries], where there are list_counts

  int64_t places() const { return filter.ids ? filter.id_count : rows; }
};
// From the lists that a scan has filled to results; values are distances of `bits` or scores.
template <int bits, class Value>
void finish_search(const Search& search, Value* values, void* stream);

// Distances up to the radius.
void hamming_search(const Search& search, const CodeRows& queries, const CodeRows& codes,
                    int64_t bytes, int64_t radius, int32_t* distances, void* stream);

// All rows up to the radius, in two steps. The first one sets offsets [queries + 1]: where each
// query's rows begin among all; the caller waits for the last of them, so many rows there are.
void hamming_count(const Search& search, const CodeRows& queries, const CodeRows& codes,
                   int64_t bytes, int64_t radius, int64_t* offsets, void* stream);
// The second one takes `lists`, `merged`, `ids` and `distances` for so many, and what the first one
// left in `list_counts`.
void hamming_collect(const Search& search, const CodeRows& queries, const CodeRows& codes,
                     int64_t bytes, int64_t radius, const int64_t* offsets, int32_t* distances,
                     void* stream);

// out: [queries, codes].
void hamming_distance(const CodeRows& queries, const CodeRows& codes, int64_t bytes,
                      const SearchPlan& plan, int32_t* out, void* stream);

inline constexpr int64_t kScoreQueries = 256;  // that have tables at the same time

struct ScoreArgs {
  const float* queries;  // [queries, dim], rows `query_stride` elements apart
  int64_t query_stride;
  int64_t dim;
  CodeRows codes;
  int64_t bytes;       // of a code, a multiple of ceil(dim / 8)
  const float* scale;  // [rows], or null for 1
  float* tables;       // workspace [min(queries, kScoreQueries), bytes, 32]
};
// The plan and the workspaces are for up to kScoreQueries queries, the first ones.
void asymmetric_search(const Search& search, const ScoreArgs& args, float* scores, void* stream);

enum class Metric { dot, cosine, l2 };  // as in dense.h

inline int dense_queries_per_block(int64_t queries) { return queries == 1 ? 1 : 4; }

template <class T>
struct DenseArgs {
  const float* queries;  // [queries, dim], rows `query_stride` elements apart
  int64_t query_stride;
  const T* documents;  // [rows, dim], rows `stride` elements apart
  int64_t stride;
  int64_t dim;  // below 2^28
  Metric metric;
};
template <class T>
void dense_search(const Search& search, const DenseArgs<T>& args, float* scores, void* stream);
// scores [queries, count] of the rows ids [queries, count]; -inf for ids that don't exist.
template <class T>
void gather_scores(const DenseArgs<T>& args, const int64_t* ids, int64_t queries, int64_t count,
                   int64_t rows, float* scores, void* stream);

struct Bits {};  // +1 and -1, packed

// Sets of tokens, one after the other.
struct TokenRows {
  const uint8_t* data;
  int64_t stride;  // bytes from one token to the next
  int bytes;       // of a token
  int64_t count;
  const int32_t* offsets;  // [sets + 1]
  int64_t sets;
};

template <class Q>  // tokens of queries
using Score = std::conditional_t<std::is_same_v<Q, double>, double, float>;

template <class A>
struct MaxSimArgs {
  TokenRows queries, documents;
  int64_t dim;
  A* scores;        // [queries.sets, documents.sets]
  int32_t* argmax;  // [queries.count, documents.sets], -1 where a document has no token; or null
};
// Tokens of queries, Q, and of documents, D, are of one type, floating-point or Bits; or float and
// Bits. `tensor_cores`: use them where the device has them.
template <class Q, class D>
void maxsim(const MaxSimArgs<Score<Q>>& args, bool tensor_cores, void* stream);

template <class A>
struct MaxSimBackwardArgs {
  const A* grad;                            // [queries.sets, documents.sets]
  TokenRows queries, documents;             // in A, contiguous
  const A *query_values, *document_values;  // their data
  int64_t dim;
  const int32_t* argmax;
  A *grad_queries, *grad_documents;  // contiguous
};
template <class A>
void maxsim_backward(const MaxSimBackwardArgs<A>& args, void* stream);

}  // namespace emblas::cuda
