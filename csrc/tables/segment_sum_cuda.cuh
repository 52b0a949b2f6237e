// Sums of rows over segments on a GPU: over the ids of a bag, or over the lookups of a table's row.
//
//   sum_s = sum of source row e over the entries e of segment s
//
// Segments are cut by bounds, bounds[s] <= e < bounds[s + 1], or as update_cuda.cuh says; a sink
// takes the sums.
//
// A warp owns a segment. Its lanes first prepare a tile of entries, one or a few lanes each (hash
// an id, read a number and a weight), then go through the tile together: a row is spread over 4 to
// 32 lanes, 16 bytes each, so that a warp reads 8 to 1 rows at once. Wider rows are cut into tiles
// of columns over the grid.
//
// A segment may be very long: one row that most ids share. From 2 kPieceEntries entries on it is
// cut into pieces counted from its own first entry, each added up by a warp of its own into a row
// of accumulators, and a block adds up these. The pieces, so the order of additions, depend on the
// segment's own length only. Which piece is a warp's? Every piece holds a multiple of kPieceEntries
// among its entries' numbers, because it has at least so many: that multiple is its slot, so slots
// are unique and their number follows from shapes.
//
// Bytes: what the source reads, out once, bounds once; 2 / kPieceEntries of the long segments' rows
// (in accumulators) for the pieces. Bound by memory bandwidth, where rows come from caches by
// theirs.
//
// Bounds are clamped to the number of entries: whatever they hold, all accesses stay inside.
#pragma once

#include "common/cuda/simt.h"
#include "tables/tables_cuda.h"

namespace emblas::cuda::tables {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;

__device__ inline int lane_of_warp() { return int(threadIdx.x % 32); }

// --- columns -------------------------------------------------------------------------------------

struct RowShape {
  int64_t dim;
  int lanes;  // of a row, 4 to 32, a power of two

  template <class T>
  EMBLAS_HOST_DEVICE static RowShape of(int64_t dim) {
    int lanes = 4;
    while (lanes < 32 && lanes * simt::kVector<T> < dim) lanes *= 2;
    return {dim, lanes};
  }
  template <class T>
  EMBLAS_HOST_DEVICE int64_t tile() const {
    return lanes * simt::kVector<T>;
  }
};

// The columns of one lane: first + i * step for i < size, as far as they are below dim. `aligned`:
// every row starts at a multiple of 16 bytes and dim is a multiple of size, so they are vectors,
// side by side.
template <class T, bool is_aligned, int columns = simt::kVector<T>>
struct Columns {
  using A = Accumulator<T>;
  static constexpr int size = columns;
  static constexpr bool aligned = is_aligned;

  int64_t first, dim;
  int step;

  __device__ Columns(const RowShape& shape, int64_t tile)
      : dim(shape.dim), step(aligned ? 1 : shape.lanes) {
    first = tile * shape.lanes * size + lane_of_warp() % shape.lanes * (aligned ? size : 1);
  }

  // Elements are of type T or wider.
  template <class E>
  __device__ void load(const E* row, A (&x)[size]) const {
    if constexpr (aligned) {
      if (first >= dim) return;
      for (int i = 0; i < size; i += simt::kVector<E>) {
        const simt::Vector<E> part = simt::load_vector(row + first + i);
        for (int j = 0; j < simt::kVector<E>; ++j) x[i + j] = simt::to_accumulator(part.at[j]);
      }
    } else {
      for (int i = 0; i < size; ++i) {
        if (first + i * step < dim) x[i] = simt::to_accumulator(row[first + i * step]);
      }
    }
  }
  template <class E>
  __device__ void store(E* row, const A (&x)[size]) const {
    if constexpr (aligned) {
      if (first >= dim) return;
      for (int i = 0; i < size; i += simt::kVector<E>) {
        simt::Vector<E> part;
        for (int j = 0; j < simt::kVector<E>; ++j) simt::from_accumulator(x[i + j], &part.at[j]);
        simt::store_vector(row + first + i, part);
      }
    } else {
      for (int i = 0; i < size; ++i) {
        if (first + i * step < dim) simt::from_accumulator(x[i], row + first + i * step);
      }
    }
  }
};

// --- segments ------------------------------------------------------------------------------------

// How many of the leading values, which rise, are at most `limit`.
template <class V>
__device__ int64_t count_up_to(const V* values, int64_t size, int64_t limit) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] <= limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The bag of an id; false if it has none.
__device__ inline bool find_bag(const BagNumbers& bags, int64_t i, int64_t* bag) {
  *bag = bags.of ? bags.of[i] : i;
  return 0 <= *bag && *bag < bags.bags;
}

struct Range {
  int64_t begin, end;

  __device__ int64_t pieces() const { return (end - begin) / kPieceEntries; }
  __device__ bool in_pieces() const { return pieces() >= 2; }
  __device__ int64_t first_slot() const { return (begin + kPieceEntries - 1) / kPieceEntries; }
  // The last piece has the rest, too.
  __device__ Range piece(int64_t k) const {
    const int64_t from = begin + k * kPieceEntries;
    return {from, k == pieces() - 1 ? end : from + kPieceEntries};
  }
};

struct Segments {
  static constexpr bool kEmptyIsZero = true;  // or it has no sum
  const int32_t* bounds;                      // [count + 1]
  int64_t count, entries;

  __device__ int64_t clamped(int64_t s) const {
    const int64_t bound = bounds[s];
    return min(max(bound, int64_t(0)), entries);
  }
  __device__ Range range(int64_t s) const {
    const int64_t begin = clamped(s), end = clamped(s + 1);
    return {begin, max(begin, end)};
  }
  // The segment that holds an entry, as far as one does.
  __device__ int64_t holding(int64_t entry) const {
    return count_up_to(bounds + 1, count - 1, entry);
  }
};

// --- sources -------------------------------------------------------------------------------------
//
// A source has a type Element of what it adds up, a number kTile of entries that a warp prepares at
// once (a multiple of 8), of which kUnroll shall be under way together, and, called by all lanes,
//   prepare(first, end)   this lane's share of entries first to first + kTile - 1 below end
//   add(prepared, n, inside, columns, sum)   adds entry first + n, which may differ between lanes

// Rows of accumulators, one for each entry.
template <class T>
struct Partials {
  using Element = T;
  static constexpr int kTile = 32, kUnroll = 4;
  const Accumulator<T>* rows;
  int64_t dim;

  __device__ int64_t prepare(int64_t first, int64_t) const { return first; }
  template <class C>
  __device__ void add(int64_t first, int n, bool inside, const C& columns,
                      Accumulator<T> (&sum)[C::size]) const {
    Accumulator<T> x[C::size] = {};
    if (inside) columns.load(rows + (first + n) * dim, x);
    for (int i = 0; i < C::size; ++i) sum[i] += x[i];
  }
};

// --- sinks ---------------------------------------------------------------------------------------
//
// put(s, shape, columns, sum), called by all lanes of a warp with the sum of their columns.

// Row s of an array [segments, dim].
template <class T>
struct StoreRows {
  T* rows;
  int64_t dim;

  template <class C>
  __device__ void put(int64_t s, const RowShape& shape, const C& columns,
                      const typename C::A (&sum)[C::size]) const {
    if (lane_of_warp() < shape.lanes) columns.store(rows + s * dim, sum);
  }
};

// --- kernels -------------------------------------------------------------------------------------

// Every lane gets the sum of its columns over the entries of a range.
template <class Source, class C>
__device__ void sum_range(const Source& source, const RowShape& shape, const C& columns,
                          const Range& range, typename C::A (&sum)[C::size]) {
  const int at_once = 32 / shape.lanes, own = lane_of_warp() / shape.lanes;
  for (int64_t first = range.begin; first < range.end; first += Source::kTile) {
    const auto prepared = source.prepare(first, range.end);
    const int64_t rest = range.end - first;
    const int count = int(min(rest, int64_t(Source::kTile)));
#pragma unroll Source::kUnroll
    for (int n = own; n < count + own; n += at_once) {
      source.add(prepared, n, n < count, columns, sum);
    }
  }
  for (int flip = shape.lanes; flip < 32; flip *= 2) {
    for (int i = 0; i < C::size; ++i) {
      sum[i] += __shfl_xor_sync(simt::kAllLanes, sum[i], flip);
    }
  }
}

// Grid (segments / kWarps, tiles of columns). Leaves out those in pieces.
template <class Source, class Segments, class Sink, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    sum_segments(Source source, Segments segments, RowShape shape, Sink sink) {
  using C = Columns<typename Source::Element, aligned>;
  const int64_t s = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (s >= segments.count) return;
  const Range range = segments.range(s);
  if (range.in_pieces() || (!Segments::kEmptyIsZero && range.begin == range.end)) return;
  const C columns(shape, blockIdx.y);
  typename C::A sum[C::size] = {};
  sum_range(source, shape, columns, range, sum);
  sink.put(s, shape, columns, sum);
}

// Grid (slots / kWarps, tiles of columns); partial [slots, dim]. Slots behind the last are idle,
// too.
template <class Source, class Segments, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    sum_pieces(Source source, Segments segments, RowShape shape,
               Accumulator<typename Source::Element>* partial) {
  using C = Columns<typename Source::Element, aligned>;
  const int64_t slot = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Range range = segments.range(segments.holding(slot * kPieceEntries));
  const int64_t k = slot - range.first_slot();  // negative under wrong bounds only
  if (!range.in_pieces() || uint64_t(k) >= uint64_t(range.pieces())) return;
  const C columns(shape, blockIdx.y);
  typename C::A sum[C::size] = {};
  sum_range(source, shape, columns, range.piece(k), sum);
  if (lane_of_warp() < shape.lanes) columns.store(partial + slot * shape.dim, sum);
}

// Grid (slots, tiles of columns): the block of a segment's first slot adds up its pieces.
template <class T, class Segments, class Sink, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    add_pieces(Partials<T> partials, Segments segments, RowShape shape, Sink sink) {
  using C = Columns<T, aligned>;
  using A = Accumulator<T>;
  SIMT_SHARED(A, of_warp, [kWarps][32 * C::size]);
  const int64_t s = segments.holding(blockIdx.x * kPieceEntries);
  const Range range = segments.range(s);
  if (!range.in_pieces() || blockIdx.x != range.first_slot()) return;
  const int64_t slot = blockIdx.x, pieces = range.pieces(), warp = threadIdx.x / 32;
  const C columns(shape, blockIdx.y);
  A sum[C::size] = {};
  sum_range(partials, shape, columns,
            {slot + pieces * warp / kWarps, slot + pieces * (warp + 1) / kWarps}, sum);
  const int lane = lane_of_warp();
  for (int i = 0; i < C::size; ++i) of_warp[warp][i * 32 + lane] = sum[i];
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kWarps; ++w) {
    for (int i = 0; i < C::size; ++i) sum[i] += of_warp[w][i * 32 + lane];
  }
  sink.put(s, shape, columns, sum);
}

}  // namespace emblas::cuda::tables
