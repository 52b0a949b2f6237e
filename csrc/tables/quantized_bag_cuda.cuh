// Quantized lookups on a GPU; the formulas stand in quantized.h.
//
// A warp owns a bag, or some ids that are bags of their own, and a tile of columns. Its lanes first
// read an id each, with its scale, zero point and weight: reads anywhere in memory, 32 of them
// under way together. Then a row is spread over 1 to 32 lanes, 16 codes each, so that a warp reads
// 32 to 1 rows at once, and these are added, or compared, in registers.
//
// A bag is pooled by one warp, so the order of additions depends on its own length only. An id that
// is no row counts for nothing.
//
// Bytes: ids, the rows in use with their scales and zero points, out once. 16 codes are 32, 16, 8
// or 4 bytes of a row, in as few reads; wider ones would leave more lanes of narrow rows idle.
// Bound by memory, where rows of few bits come from caches by the three instructions that each code
// takes.
#pragma once

#include "tables/quantized_cuda.h"
#include "tables/segment_sum_cuda.cuh"

namespace emblas::cuda::tables {

inline constexpr int kCodes = 16;    // of a row, that a lane owns
inline constexpr int kLeastIds = 8;  // that a warp looks up, without bags

// A row is spread over so many lanes as have codes of it, up to a warp. Lanes that go through it in
// steps of their number need whole bytes for a step.
EMBLAS_HOST_DEVICE inline RowShape code_shape(int64_t dim, bool aligned) {
  int lanes = aligned ? 1 : 4;
  while (lanes < 32 && lanes * kCodes < dim) lanes *= 2;
  return {dim, lanes};
}

// Ids that a warp looks up one after the other: at least all that it reads at once.
EMBLAS_HOST_DEVICE inline int ids_of_warp(const RowShape& shape) {
  const int at_once = 32 / shape.lanes;
  return at_once > kLeastIds ? at_once : kLeastIds;
}

// A code below 2^16 as a number. Many a GPU converts a quarter as fast as it adds: the bits of a
// float of 2^23 and more count up.
__device__ inline float number(uint32_t code, float) {
  const uint32_t bits = 0x4b000000 | code;
  float sum;
  memcpy(&sum, &bits, sizeof sum);
  return sum - 0x1p23f;
}
__device__ inline double number(uint32_t code, double) { return double(code); }

template <int count>
__device__ void load_words(const uint8_t* from, uint32_t (&words)[count]) {
  if constexpr (count == 1) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (count == 2) {
    const uint64_t both = *reinterpret_cast<const uint64_t*>(from);
    words[0] = uint32_t(both);
    words[1] = uint32_t(both >> 32);
  } else {
    for (int w = 0; w < count; w += 4) {
      const uint4 four = simt::load_16_bytes(from + 4 * w);
      words[w] = four.x;
      words[w + 1] = four.y;
      words[w + 2] = four.z;
      words[w + 3] = four.w;
    }
  }
}

template <class T, int bits>
struct QuantizedRows {
  using A = Accumulator<T>;
  static constexpr uint32_t kMask = (1u << bits) - 1;
  QuantizedArgs<T> args;

  struct Row {
    int64_t number;  // negative for an id that counts for nothing
    A coefficient, zero;
  };

  __device__ Row find(int64_t i, int64_t end) const {
    Row row{-1, A(0), A(0)};
    if (i >= end) return row;
    const int64_t id = args.ids[i];
    if (args.has_padding && id == args.padding_id) return row;
    if (uint64_t(id) >= uint64_t(args.rows)) return row;
    row.number = id;
    row.coefficient = simt::to_accumulator(args.scale[id]);
    if (args.weights) row.coefficient *= args.weights[i];
    row.zero = args.zero ? args.zero[id] : A(1 << (bits - 1));
    return row;
  }

  // The row that a lane has found; lanes may ask different ones.
  __device__ static Row of_lane(const Row& own, int lane) {
    const int64_t number = __shfl_sync(simt::kAllLanes, own.number, lane);
    const A coefficient = __shfl_sync(simt::kAllLanes, own.coefficient, lane);
    return {number, coefficient, __shfl_sync(simt::kAllLanes, own.zero, lane)};
  }

  // The lane's columns of a row.
  template <class C>
  __device__ void load(const Row& row, const C& columns, A (&x)[C::size]) const {
    const uint8_t* from = args.packed + row.number * args.row_bytes;
    const auto value = [&](uint32_t code) {
      return row.coefficient * (number(code & kMask, A(0)) - row.zero);
    };
    if constexpr (C::aligned) {
      if (columns.first >= columns.dim) return;
      uint32_t words[kCodes * bits / 32];
      load_words(from + columns.first * bits / 8, words);
      for (int i = 0; i < kCodes; ++i) x[i] = value(words[i * bits / 32] >> i * bits % 32);
    } else {
      const uint8_t* byte = from + columns.first * bits / 8;
      const int shift = columns.first * bits % 8, stride = columns.step * bits / 8;
      for (int i = 0; i < kCodes; ++i, byte += stride) {
        if (columns.first + i * columns.step >= columns.dim) return;
        uint32_t code = *byte;
        if constexpr (bits == 16) code |= uint32_t(byte[1]) << 8;
        x[i] = value(code >> shift);
      }
    }
  }
};

// Grid (bags / kWarps, tiles of columns); out [bags, dim].
template <class T, int bits, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    pool_codes(QuantizedRows<T, bits> rows, RowShape shape, T* out) {
  using A = Accumulator<T>;
  using C = Columns<T, aligned, kCodes>;
  [[maybe_unused]] constexpr int rows_at_once =
      aligned ? 4 : 1;  // of which a lane reads 16 codes, or one code
  const auto& args = rows.args;
  const int64_t bag = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (bag >= args.bags) return;
  const C columns(shape, blockIdx.y);
  const Range range = Segments{args.offsets, args.bags, args.count}.range(bag);
  const int at_once = 32 / shape.lanes, own = lane_of_warp() / shape.lanes;
  const bool maximum = args.mode == BagMode::max;
  const auto join = [maximum](A& total, A x) {
    total = !maximum ? total + x : x > total ? x : total;
  };
  A total[kCodes];
  for (int k = 0; k < kCodes; ++k) total[k] = maximum ? A(-INFINITY) : A(0);
  int used = 0;
  for (int64_t first = range.begin; first < range.end; first += 32) {
    const auto found = rows.find(first + lane_of_warp(), range.end);
    used += found.number >= 0;
    const int64_t rest = range.end - first;
    const int count = int(min(rest, int64_t(32)));
#pragma unroll rows_at_once
    for (int n = own; n < count + own; n += at_once) {
      const auto row = rows.of_lane(found, n);
      if (row.number < 0) continue;
      A x[kCodes] = {};
      rows.load(row, columns, x);
      for (int k = 0; k < kCodes; ++k) join(total[k], x[k]);
    }
  }
  for (int flip = shape.lanes; flip < 32; flip *= 2) {
    for (int k = 0; k < kCodes; ++k) {
      join(total[k], __shfl_xor_sync(simt::kAllLanes, total[k], flip));
    }
  }
  used = simt::warp_sum(used);
  for (int k = 0; k < kCodes; ++k) {
    if (used == 0) total[k] = A(0);
    if (args.mode == BagMode::mean && used > 0) total[k] *= A(1) / A(used);
  }
  if (lane_of_warp() < shape.lanes) columns.store(out + bag * shape.dim, total);
}

// Grid (ids / (kWarps * ids_of_warp), tiles of columns); out [ids, dim].
template <class T, int bits, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    look_up_codes(QuantizedRows<T, bits> rows, RowShape shape, T* out) {
  [[maybe_unused]] constexpr int rows_at_once = aligned ? 4 : 1;
  const int64_t count = rows.args.count, own = ids_of_warp(shape);
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * own;
  if (first >= count) return;
  const Columns<T, aligned, kCodes> columns(shape, blockIdx.y);
  const auto found = rows.find(first + lane_of_warp(), count);
#pragma unroll rows_at_once
  for (int n = lane_of_warp() / shape.lanes; n < own; n += 32 / shape.lanes) {
    const auto row = rows.of_lane(found, n);
    Accumulator<T> x[kCodes] = {};
    if (row.number >= 0) rows.load(row, columns, x);
    if (first + n < count) columns.store(out + (first + n) * shape.dim, x);
  }
}

// Grid (ids / (kWarps * ids_of_warp)); grad_out [bags, dim], grad_weights [ids].
template <class T, int bits, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    dot_codes(QuantizedRows<T, bits> rows, BagNumbers bags, RowShape shape, const T* grad_out,
              Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  const int64_t count = rows.args.count, own = ids_of_warp(shape);
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * own;
  if (first >= count) return;
  const auto found = rows.find(first + lane_of_warp(), count);
  for (int n = lane_of_warp() / shape.lanes; n < own; n += 32 / shape.lanes) {
    const auto row = rows.of_lane(found, n);
    const int64_t i = first + n;
    int64_t bag = 0;
    A dot = 0;
    if (row.number >= 0 && find_bag(bags, i, &bag)) {
      for (int64_t tile = 0; tile * shape.lanes * kCodes < shape.dim; ++tile) {
        const Columns<T, aligned, kCodes> columns(shape, tile);
        A x[kCodes] = {}, gradient[kCodes] = {};
        rows.load(row, columns, x);
        columns.load(grad_out + bag * shape.dim, gradient);
        for (int k = 0; k < kCodes; ++k) dot += x[k] * gradient[k];
      }
    }
    for (int flip = 1; flip < shape.lanes; flip *= 2) {
      dot += __shfl_xor_sync(simt::kAllLanes, dot, flip);
    }
    if (i < count && lane_of_warp() % shape.lanes == 0) grad_weights[i] = dot;
  }
}

}  // namespace emblas::cuda::tables
