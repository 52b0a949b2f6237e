// Packing signs on a GPU: bit = x > threshold, bit 7 of byte 0 is dimension 0.
//
// A thread turns the values of 16 bytes into bits; as many neighbouring threads as a byte has such
// pieces (1 for 16-bit values, 2 for float, 4 for double) join theirs by shuffles. Bytes: x once,
// 1 / 8 byte per value written; bound by memory bandwidth.
#pragma once

#include "binary/binary_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr int kPackThreads = 256;

// Grid (ceil(rows / rows_per_block)). `aligned`: rows start at multiples of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows(PackSignArgs<T> args, int rows_per_block) {
  using A = Accumulator<T>;
  constexpr int values = simt::kVector<T>;  // of a thread
  constexpr int pieces = 8 / values;        // of a byte
  const int64_t bytes = (args.dim + 7) / 8;
  const unsigned row_pieces = unsigned(bytes * pieces);
  const int64_t first_row = int64_t(blockIdx.x) * rows_per_block;
  const int64_t rows = min(args.rows - first_row, int64_t(rows_per_block));
  // Whole warps, for the shuffles.
  for (int64_t first = 0; first < rows * row_pieces; first += kPackThreads) {
    const int64_t at = first + threadIdx.x;
    const int64_t row = first_row + at / row_pieces;
    const int64_t column = at % row_pieces * values;
    unsigned bits = 0;
    if (at < rows * row_pieces) {
      const T* x = args.x + row * args.row_stride + column;
      const auto add = [&](int i, T value) {
        const A limit = args.threshold ? args.threshold[column + i] : A(0);
        const bool above = simt::to_accumulator(value) > limit;
        bits |= unsigned(above) << (7 - (column + i) % 8);
      };
      if (aligned && column + values <= args.dim) {
        const simt::Vector<T> vector = simt::load_vector(x);
        for (int i = 0; i < values; ++i) add(i, vector.at[i]);
      } else {
        for (int i = 0; i < values && column + i < args.dim; ++i) add(i, x[i]);
      }
    }
    for (int flip = 1; flip < pieces; flip *= 2)
      bits |= __shfl_xor_sync(simt::kAllLanes, bits, flip);
    if (at < rows * row_pieces && at % pieces == 0) {
      args.codes[row * bytes + column / 8] = uint8_t(bits);
    }
  }
}

}  // namespace emblas::cuda
