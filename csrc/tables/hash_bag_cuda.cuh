// Hashed lookups on a GPU; the formulas stand in tables.h, how sums over bags and over rows of the
// table run in segment_sum_cuda.cuh.
//
// Forward. A warp hashes eight ids at once, four lanes to an id, each lane four of its keys (some
// hundred instructions), and hands the row numbers around by shuffles; keys never reach memory.
// Without bags, `look_up` writes one row for each id; with bags, the sums do.
//
// Backward for the table, without atomics: `hash_ids` writes the row of every lookup, the caller
// sorts them (stably), `find_bounds` cuts the sorted list at the rows of the table, and the sums
// add up a row's gradients in the order of the ids. For the weights, `dot_rows` looks the rows up
// again.
//
// Bytes: forward reads ids and K rows for each id, and writes out. Backward reads a row of grad_out
// for each lookup, and 12 to 20 bytes of numbers, and writes the table once. Rows come from memory
// as often as caches miss: small tables are bound by the caches' bandwidth, large ones by memory's.
#pragma once

#include "tables/segment_sum_cuda.cuh"

namespace emblas::cuda::tables {

inline constexpr int kTileIds = 8;                 // that a warp hashes at once
inline constexpr int kLanesPerId = 32 / kTileIds;  // each makes kKeys keys
inline constexpr int kKeys = kMaxHashes / kLanesPerId;
static_assert(kKeys == 4, "four_keys");

// Keys 4 * group to 4 * group + 3 of an id, as row numbers.
struct FourRows {
  uint32_t at[kKeys];
};
__device__ inline FourRows four_rows(const HashedIds& hashed, int64_t id, int group) {
  const Modulo modulo(hashed.num_embeddings, hashed.reciprocal);
  const auto words = four_keys(hashed.family, hashed.seed, uint64_t(id), group);
  return {uint32_t(modulo(words.low & 0xffffffff)), uint32_t(modulo(words.low >> 32)),
          uint32_t(modulo(words.high & 0xffffffff)), uint32_t(modulo(words.high >> 32))};
}

__device__ inline bool is_padding(const HashedIds& hashed, int64_t id) {
  return hashed.has_padding && id == hashed.padding_id;
}

// --- sources -------------------------------------------------------------------------------------

// The embedding of each id, times its weight.
template <class T>
struct HashedRows {
  using Element = T;
  using A = Accumulator<T>;
  static constexpr int kTile = kTileIds, kUnroll = 2;
  HashedIds hashed;
  const T* table;
  int64_t row_stride;
  const A* weights;

  struct Prepared {
    FourRows rows;
    A weight;
    unsigned present;  // a bit of each lane: has its id to be looked up?
  };
  __device__ Prepared prepare(int64_t first, int64_t end) const {
    const int lane = lane_of_warp(), group = lane % kLanesPerId;
    const int64_t i = first + lane / kLanesPerId;
    Prepared own{{}, A(1), 0};
    bool present = false;
    if (i < end) {
      const int64_t id = hashed.ids[i * hashed.stride];
      present = !is_padding(hashed, id);
      own.rows = four_rows(hashed, id, group);
      if (weights) own.weight = weights[i];
    }
    own.present = __ballot_sync(simt::kAllLanes, present);
    return own;
  }

  template <class C>
  __device__ void add(const Prepared& own, int n, bool inside, const C& columns,
                      A (&sum)[C::size]) const {
    const int source = n * kLanesPerId;
    const bool present = inside && (own.present >> source & 1);
    const A weight = __shfl_sync(simt::kAllLanes, own.weight, source);
    A total[C::size] = {};
    for (int first = 0; first < hashed.num_hashes; first += kKeys) {
      A x[kKeys][C::size] = {};  // all loads before the first addition
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int64_t row = __shfl_sync(simt::kAllLanes, own.rows.at[j], source + first / kKeys);
        if (present && first + j < hashed.num_hashes) columns.load(table + row * row_stride, x[j]);
      }
      for (int j = 0; j < kKeys; ++j) {
        for (int i = 0; i < C::size; ++i) total[i] += x[j][i];
      }
    }
    for (int i = 0; i < C::size; ++i) sum[i] += weight * total[i];
  }
};

// The gradient of the bag of each lookup, times the weight of its id.
template <class T>
struct SortedGradients {
  using Element = T;
  using A = Accumulator<T>;
  static constexpr int kTile = 32, kUnroll = 4;
  HashBagTableArgs<T> args;

  struct Prepared {
    int64_t bag;
    A weight;
  };
  __device__ Prepared prepare(int64_t first, int64_t end) const {
    const int64_t place = first + lane_of_warp();
    Prepared own{0, A(1)};
    if (place < end) {
      const int64_t i = uint32_t(args.order[place]) / uint32_t(args.num_hashes);
      own.bag = args.bags.of ? args.bags.of[i] : i;  // ids without one were sorted behind
      if (args.weights) own.weight = args.weights[i];
    }
    return own;
  }

  template <class C>
  __device__ void add(const Prepared& own, int n, bool inside, const C& columns,
                      A (&sum)[C::size]) const {
    const int64_t bag = __shfl_sync(simt::kAllLanes, own.bag, n);
    const A weight = __shfl_sync(simt::kAllLanes, own.weight, n);
    A x[C::size] = {};
    if (inside) columns.load(args.grad_out + bag * args.dim, x);
    for (int i = 0; i < C::size; ++i) sum[i] += weight * x[i];
  }
};

// --- kernels -------------------------------------------------------------------------------------

// Grid (ids / kThreads, groups of four keys).
template <class Key>
__global__ void __launch_bounds__(kThreads, 2)
    hash_ids(HashedIds hashed, BagNumbers bags, Key* keys) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= hashed.count) return;
  const int64_t id = hashed.ids[i * hashed.stride];
  const int first = kKeys * blockIdx.y;
  const FourRows rows = four_rows(hashed, id, blockIdx.y);
  int64_t bag;
  const bool counts = find_bag(bags, i, &bag) && !is_padding(hashed, id);
  Key* to = keys + i * hashed.num_hashes + first;
  const auto key = [&](int j) { return counts ? Key(rows.at[j]) : Key(hashed.num_embeddings); };
  if (hashed.num_hashes % kKeys == 0) {
    for (int j = 0; j < kKeys; j += simt::kVector<Key>) {
      simt::Vector<Key> part;
      for (int k = 0; k < simt::kVector<Key>; ++k) part.at[k] = key(j + k);
      simt::store_vector(to + j, part);
    }
  } else {
    for (int j = 0; j < kKeys; ++j) {
      if (first + j < hashed.num_hashes) to[j] = key(j);
    }
  }
}

// Grid (ids / kThreads).
__global__ void __launch_bounds__(kThreads, 2)
    find_bags(const int32_t* offsets, int64_t bags, int64_t ids, int32_t* numbers) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < ids) numbers[i] = int32_t(count_up_to(offsets, bags + 1, i) - 1);
}

// Grid ((rows + 1) / kThreads).
__global__ void __launch_bounds__(kThreads, 2)
    find_bounds(const int32_t* keys, int64_t lookups, int64_t rows, int32_t* bounds) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row <= rows) bounds[row] = int32_t(count_up_to(keys, lookups, row - 1));
}

// Grid (ids / (kWarps * kTileIds), tiles of columns); out [ids, dim].
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2) look_up(HashedRows<T> rows, RowShape shape, T* out) {
  using C = Columns<T, aligned>;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kTileIds;
  if (first >= rows.hashed.count) return;
  const C columns(shape, blockIdx.y);
  const auto prepared = rows.prepare(first, rows.hashed.count);
#pragma unroll 2
  for (int n = lane_of_warp() / shape.lanes; n < kTileIds; n += 32 / shape.lanes) {
    const bool inside = first + n < rows.hashed.count;
    Accumulator<T> sum[C::size] = {};
    rows.add(prepared, n, inside, columns, sum);
    if (inside) columns.store(out + (first + n) * shape.dim, sum);
  }
}

// Grid (ids / (kWarps * kTileIds)); grad_out [bags, dim], grad_weights [ids].
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    dot_rows(HashedRows<T> rows, BagNumbers bags, RowShape shape, const T* grad_out,
             Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  using C = Columns<T, aligned>;
  const int64_t count = rows.hashed.count;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kTileIds;
  if (first >= count) return;
  const auto prepared = rows.prepare(first, count);
  for (int n = lane_of_warp() / shape.lanes; n < kTileIds; n += 32 / shape.lanes) {
    const int64_t i = first + n;
    int64_t bag = 0;
    const bool inside = i < count && find_bag(bags, i, &bag);
    A dot = 0;
    for (int64_t tile = 0; tile * shape.tile<T>() < shape.dim; ++tile) {
      const C columns(shape, tile);
      A sum[C::size] = {}, gradient[C::size] = {};
      rows.add(prepared, n, inside, columns, sum);
      if (inside) columns.load(grad_out + bag * shape.dim, gradient);
      for (int k = 0; k < C::size; ++k) dot += sum[k] * gradient[k];
    }
    for (int flip = 1; flip < shape.lanes; flip *= 2) {
      dot += __shfl_xor_sync(simt::kAllLanes, dot, flip);
    }
    if (i < count && lane_of_warp() % shape.lanes == 0) grad_weights[i] = dot;
  }
}

}  // namespace emblas::cuda::tables
